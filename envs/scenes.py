"""scenes: procedural images of several objects, with questions of graded difficulty about them.

Which tokens matter depends on the question, and so does how much has to be computed: to see that there is a red circle
is one step, to name the colour of what stands left of it is two. Everything follows from a seed, to the byte.
"""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Iterator
from typing import Any

import datasets
import numpy as np
from PIL import Image, ImageDraw

from backbones.errors import InputError
from envs.cached import cached
from envs.scene_questions import ASKERS, COLORS, SHAPES, Object, Question

VERSION = 1
"""Raised when the same seed gives other bytes than before, so that no cache mixes the two."""

SPLITS = {"train": 16_000, "validation": 500, "test": 1_250}
"""Images a split by default; each has ``QUESTIONS`` questions."""

QUESTIONS = 8
GRID = 8
"""The metadata's patches are numbered, row by row, on a grid of so many cells a side."""

PALETTE = {
    "red": (214, 39, 40),
    "green": (44, 160, 44),
    "blue": (31, 80, 200),
    "yellow": (240, 205, 40),
    "purple": (140, 60, 180),
    "cyan": (30, 190, 205),
}
RADII = {"small": 0.08, "large": 0.135}
"""Half an object's height over the image's side."""


FEATURES = datasets.Features(
    {
        "id": datasets.Value("string"),
        "image": datasets.Image(),
        "question": datasets.Value("string"),
        "answers": datasets.List(datasets.Value("string")),
        "type": datasets.Value("string"),
        "objects": datasets.Value("int32"),
        "patches": datasets.List(datasets.Value("int32")),
    }
)


def scenes(split: str, size: int = 64, images: int | None = None, seed: int = 0) -> datasets.Dataset:
    """A split of scenes, made at first use and then read from the cache of ``datasets`` (``HF_DATASETS_CACHE``).

    Beside the columns of every data set it has ``type`` (the kind of question), ``objects`` (how many there are) and
    ``patches`` (which cells of an 8 x 8 grid the answer hangs on): for audits, never shown to a controller.

    Args:
        split: ``train``, ``validation`` or ``test``; they share no image.
        size: pixels of an image's side.
        images: how many; by default 16,000 to train on, 500 and 1,250 otherwise. Each has 8 questions.
        seed: another seed is another data set.

    Raises:
        InputError: an impossible size or number, or a cache that cannot be written.
    """
    if size < 32 or (images is not None and images < 1) or seed < 0:
        raise InputError(
            f"scenes of size={size}, images={images}, seed={seed}; size must be at least 32, images 1, seed 0"
        )
    options = {"split": split, "size": size, "images": images or SPLITS[split], "seed": seed, "version": VERSION}
    return cached(generate, options, FEATURES, split, "scenes")


def generate(split: str, size: int, images: int, seed: int, version: int = VERSION) -> Iterator[dict[str, Any]]:
    """Rows of a split, ``QUESTIONS`` an image.

    Args:
        split: its name.
        size: pixels of an image's side.
        images: how many.
        seed: everything follows from it.
        version: part of the cache's key, nothing else.
    """
    asked: Counter[str] = Counter()
    for number in range(images):
        rng = np.random.default_rng((seed, list(SPLITS).index(split), number))
        objects = draw_objects(rng)
        questions = ask(objects, asked, rng)
        image = {"bytes": png(render(objects, size, rng)), "path": None}
        for place, question in enumerate(questions):
            yield {
                "id": f"{split}-{number}-{place}",
                "image": image,
                "question": question.text,
                "answers": [question.answer],
                "type": question.kind,
                "objects": len(objects),
                "patches": patches_of(question.about),
            }


def draw_objects(rng: np.random.Generator) -> list[Object]:
    """Three to six objects that neither overlap nor touch the border."""
    wanted = int(rng.integers(3, 7))
    objects: list[Object] = []
    while len(objects) < wanted:
        size = "large" if rng.random() < 0.4 else "small"
        radius = RADII[size]
        for _ in range(50):
            x, y = rng.uniform(radius + 0.02, 1 - radius - 0.02, size=2)
            if all(max(abs(x - o.x), abs(y - o.y)) > radius + RADII[o.size] + 0.03 for o in objects):
                break
        else:
            objects.clear()  # too crowded: begin again
            continue
        shape, color = SHAPES[rng.integers(len(SHAPES))], COLORS[rng.integers(len(COLORS))]
        objects.append(Object(shape, color, size, float(x), float(y)))
    return objects


def ask(objects: list[Object], asked: Counter[str], rng: np.random.Generator) -> list[Question]:
    """``QUESTIONS`` different questions about a scene.

    Kinds, their templates, and the answers within a template are taken in the order of how seldom they came up so far,
    as far as the scene allows: so answers are balanced within every template, whatever scenes happen to hold, and a
    question alone says little. No kind comes three times while another could come twice.

    Args:
        objects: the scene.
        asked: how often each kind, template, and template with answer came up; counted on.
        rng: breaks ties.
    """

    def rarest(options: set[str]) -> str:
        return min(sorted(options), key=lambda option: (asked[option], rng.random()))

    possible = {kind: asker(objects) for kind, asker in ASKERS.items()}
    chosen: list[Question] = []
    while len(chosen) < QUESTIONS:
        open_kinds = {kind for kind, questions in possible.items() if questions}
        kind = rarest({kind for kind in open_kinds if sum(q.kind == kind for q in chosen) < 2} or open_kinds)
        template = rarest({question.template for question in possible[kind]})
        fitting = [question for question in possible[kind] if question.template == template]
        answer = rarest({f"{template} {question.answer}" for question in fitting})
        fitting = [question for question in fitting if f"{template} {question.answer}" == answer]
        question = fitting[rng.integers(len(fitting))]
        chosen.append(question)
        possible[kind].remove(question)
        asked.update((kind, template, answer))
    return chosen


def patches_of(objects: tuple[Object, ...]) -> list[int]:
    """Grid cells that some objects cover, ascending."""
    cells = set()
    for o in objects:
        low_x, high_x, low_y, high_y = (
            min(GRID - 1, max(0, int(GRID * edge)))
            for edge in (o.x - RADII[o.size], o.x + RADII[o.size], o.y - RADII[o.size], o.y + RADII[o.size])
        )
        cells |= {row * GRID + column for row in range(low_y, high_y + 1) for column in range(low_x, high_x + 1)}
    return sorted(cells)


def render(objects: list[Object], size: int, rng: np.random.Generator) -> Image.Image:
    """The scene as an image: drawn at four times its size and scaled down, over a tinted background with a few gray
    strokes and specks that mean nothing."""
    scale = 4 * size
    background = tuple(int(value) for value in rng.integers(215, 256, 3))
    image = Image.new("RGB", (scale, scale), background)
    draw = ImageDraw.Draw(image)
    for _ in range(int(rng.integers(1, 4))):
        (x, y), (dx, dy) = rng.uniform(0, scale, 2), rng.normal(0, scale / 10, 2)
        draw.line((x, y, x + dx, y + dy), fill=(150, 150, 150), width=max(2, scale // 64))
    for o in objects:
        color = tuple(int(np.clip(value + rng.normal(0, 10), 0, 255)) for value in PALETTE[o.color])
        _draw(draw, o, scale, color)
    pixels = np.array(image.resize((size, size), Image.Resampling.BOX))
    specks = rng.random((size, size)) < 0.02
    pixels[specks] = rng.integers(90, 200, (int(specks.sum()), 1))
    return Image.fromarray(pixels)


def _draw(draw: ImageDraw.ImageDraw, o: Object, scale: int, color: Any) -> None:
    x, y, radius = o.x * scale, o.y * scale, RADII[o.size] * scale
    if o.shape == "circle":
        draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=color)
    elif o.shape == "square":
        side = 0.9 * radius
        draw.rectangle((x - side, y - side, x + side, y + side), fill=color)
    else:
        draw.polygon([(x, y - radius), (x - radius, y + radius), (x + radius, y + radius)], fill=color)


def png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()
