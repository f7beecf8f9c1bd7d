"""scenes: procedural images of several objects, with questions of graded difficulty about them.

Which tokens matter depends on the question, and so does how much has to be computed: to see that there is a red circle
is one step, to name the colour of what stands left of it is two. Everything follows from a seed, to the byte.
"""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import datasets
import numpy as np
from PIL import Image, ImageDraw

from maskgym.common.errors import InputError
from maskgym.envs.data.cached import cached
from maskgym.envs.data.scene_questions import ASKERS, COLORS, SHAPES, Asker, Object, Question

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


@dataclass(frozen=True)
class Layout:
    """How crowded scenes are, and how they are drawn.

    Attributes:
        fewest: objects in a scene.
        most: objects in a scene.
        radii: half an object's height over the image's side, by its size.
        free: between two objects, in image sides.
        finer: so many times its size an image is drawn, before it is scaled down.
    """

    fewest: int
    most: int
    radii: Mapping[str, float]
    free: float
    finer: int


LAYOUT = Layout(fewest=3, most=6, radii=RADII, free=0.03, finer=4)


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
    check_options("scenes", 32, size, images, seed)
    options = {"split": split, "size": size, "images": images or SPLITS[split], "seed": seed, "version": VERSION}
    return cached(generate, options, FEATURES, split, "scenes")


def check_options(what: str, least: int, size: int, images: int | None, seed: int) -> None:
    """Refuses a size below ``least`` pixels, no images, and a seed below 0.

    Raises:
        InputError: any of these.
    """
    if size < least or (images is not None and images < 1) or seed < 0:
        raise InputError(
            f"{what} of size={size}, images={images}, seed={seed}; size must be at least {least}, images 1, seed 0"
        )


def generate(split: str, size: int, images: int, seed: int, version: int = VERSION) -> Iterator[dict[str, Any]]:
    """Rows of a split, ``QUESTIONS`` an image.

    Args:
        split: its name.
        size: pixels of an image's side.
        images: how many.
        seed: everything follows from it.
        version: part of the cache's key, nothing else.
    """
    return rows(split, size, images, seed, LAYOUT, ask)


def rows(
    split: str,
    size: int,
    images: int,
    seed: int,
    layout: Layout,
    ask: Callable[[list[Object], Counter[str], np.random.Generator], list[Question]],
) -> Iterator[dict[str, Any]]:
    """Rows of a split of scenes of some layout, with the questions that ``ask`` asks of each."""
    asked: Counter[str] = Counter()
    for number in range(images):
        rng = np.random.default_rng((seed, list(SPLITS).index(split), number))
        objects = draw_objects(rng, layout)
        questions = ask(objects, asked, rng)
        image = {"bytes": png(render(objects, size, rng, layout)), "path": None}
        for place, question in enumerate(questions):
            yield {
                "id": f"{split}-{number}-{place}",
                "image": image,
                "question": question.text,
                "answers": [question.answer],
                "type": question.kind,
                "objects": len(objects),
                "patches": patches_of(question.about, layout.radii),
            }


def draw_objects(rng: np.random.Generator, layout: Layout = LAYOUT) -> list[Object]:
    """A scene's objects, which neither overlap nor touch the border."""
    radii, free = layout.radii, layout.free
    wanted = int(rng.integers(layout.fewest, layout.most + 1))
    objects: list[Object] = []
    while len(objects) < wanted:
        size = "large" if rng.random() < 0.4 else "small"
        radius = radii[size]
        for _ in range(50):
            x, y = rng.uniform(radius + 0.02, 1 - radius - 0.02, size=2)
            if all(max(abs(x - o.x), abs(y - o.y)) > radius + radii[o.size] + free for o in objects):
                break
        else:
            objects.clear()  # too crowded: begin again
            continue
        shape, color = SHAPES[rng.integers(len(SHAPES))], COLORS[rng.integers(len(COLORS))]
        objects.append(Object(shape, color, size, float(x), float(y)))
    return objects


def ask(
    objects: list[Object],
    asked: Counter[str],
    rng: np.random.Generator,
    askers: Mapping[str, Asker] = ASKERS,
    number: int = QUESTIONS,
) -> list[Question]:
    """Different questions about a scene.

    Kinds, their templates, and the answers within a template are taken in the order of how seldom they came up so far,
    as far as the scene allows: so answers are balanced within every template, whatever scenes happen to hold, and a
    question alone says little. No kind comes three times while another could come twice.

    Args:
        objects: the scene.
        asked: how often each kind, template, and template with answer came up; counted on.
        rng: breaks ties.
        askers: by kind, what can be asked.
        number: of questions; fewer are returned where the scene has no more.
    """

    def rarest(options: Iterable[str]) -> str:
        return min(sorted(options), key=lambda option: (asked[option], rng.random()))

    possible = {kind: _by_template(asker(objects)) for kind, asker in askers.items()}
    chosen: list[Question] = []
    while len(chosen) < number and (open_kinds := {kind for kind, templates in possible.items() if templates}):
        kind = rarest({kind for kind in open_kinds if sum(q.kind == kind for q in chosen) < 2} or open_kinds)
        template = rarest(possible[kind])
        answers = possible[kind][template]
        answer = rarest(answers)
        fitting = answers[answer]
        chosen.append(fitting.pop(rng.integers(len(fitting))))
        asked.update((kind, template, answer))
        if not fitting:
            del answers[answer]
        if not answers:
            del possible[kind][template]
    return chosen


def _by_template(questions: list[Question]) -> dict[str, dict[str, list[Question]]]:
    """Questions by template, and then by template and answer."""
    found: dict[str, dict[str, list[Question]]] = {}
    for question in questions:
        answers = found.setdefault(question.template, {})
        answers.setdefault(f"{question.template} {question.answer}", []).append(question)
    return found


def patches_of(objects: tuple[Object, ...], radii: Mapping[str, float]) -> list[int]:
    """Grid cells that some objects cover, ascending."""
    cells = set()
    for o in objects:
        low_x, high_x, low_y, high_y = (
            min(GRID - 1, max(0, int(GRID * edge)))
            for edge in (o.x - radii[o.size], o.x + radii[o.size], o.y - radii[o.size], o.y + radii[o.size])
        )
        cells |= {row * GRID + column for row in range(low_y, high_y + 1) for column in range(low_x, high_x + 1)}
    return sorted(cells)


def render(objects: list[Object], size: int, rng: np.random.Generator, layout: Layout = LAYOUT) -> Image.Image:
    """The scene as an image: drawn larger and scaled down, over a tinted background with a few gray strokes and specks
    that mean nothing."""
    scale = layout.finer * size
    background = tuple(int(value) for value in rng.integers(215, 256, 3))
    image = Image.new("RGB", (scale, scale), background)
    draw = ImageDraw.Draw(image)
    for _ in range(int(rng.integers(1, 4))):
        (x, y), (dx, dy) = rng.uniform(0, scale, 2), rng.normal(0, scale / 10, 2)
        draw.line((x, y, x + dx, y + dy), fill=(150, 150, 150), width=max(2, scale // 64))
    for o in objects:
        color = tuple(int(min(255, max(0, value + rng.normal(0, 10)))) for value in PALETTE[o.color])
        _draw(draw, o, scale, layout.radii[o.size] * scale, color)
    pixels = np.array(image.resize((size, size), Image.Resampling.BOX))
    specks = rng.random((size, size)) < 0.02
    pixels[specks] = rng.integers(90, 200, (int(specks.sum()), 1))
    return Image.fromarray(pixels)


def _draw(draw: ImageDraw.ImageDraw, o: Object, scale: int, radius: float, color: Any) -> None:
    x, y = o.x * scale, o.y * scale
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
