"""scenes-long: crowded scenes, with questions of which half are answered by a list, a phrase or a sentence.

``scene`` and ``ask`` also make them one by one, without end, to train on.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from functools import partial
from typing import Any

import datasets
import numpy as np
from PIL import Image

import maskgym.envs.data.scenes as scenes
from maskgym.envs.data.cached import cached
from maskgym.envs.data.scene_questions import ASKERS, Asker, Object, Question, count, two_hop
from maskgym.envs.data.scene_sentences import CLEAR, SENTENCE_ASKERS

VERSION = 1
"""Raised when the same seed gives other bytes than before, so that no cache mixes the two."""

SPLITS = {"train": 8_000, "validation": 500, "test": 1_250}
"""Images a split by default; each has ``scenes.QUESTIONS`` questions."""

LAYOUT = scenes.Layout(fewest=6, most=12, radii={"small": 0.05, "large": 0.085}, free=0.02, finer=2)

SHORT_ASKERS: dict[str, Asker] = ASKERS | {"count": partial(count, most=4), "two-hop": partial(two_hop, apart=CLEAR)}
"""The kinds of ``scenes``, as far as the crowd allows."""


def scenes_long(split: str, size: int = 128, images: int | None = None, seed: int = 0) -> datasets.Dataset:
    """A split of crowded scenes, with the columns of ``scenes``, cached as there.

    Args:
        split: ``train``, ``validation`` or ``test``; they share no image.
        size: pixels of an image's side.
        images: how many; by default 8,000 to train on, 500 and 1,250 otherwise. Each has 8 questions.
        seed: another seed is another data set.

    Raises:
        InputError: an impossible size or number, or a cache that cannot be written.
    """
    scenes.check_options("scenes-long", 64, size, images, seed)
    options = {"split": split, "size": size, "images": images or SPLITS[split], "seed": seed, "version": VERSION}
    return cached(generate, options, scenes.FEATURES, split, "scenes-long")


def generate(split: str, size: int, images: int, seed: int, version: int = VERSION) -> Iterator[dict[str, Any]]:
    """Rows of a split, as ``scenes.generate`` makes them."""
    return scenes.rows(split, size, images, seed, LAYOUT, ask)


def scene(rng: np.random.Generator, size: int = 128) -> tuple[list[Object], Image.Image]:
    """A scene of its own: six to twelve objects, and their picture of ``size`` pixels a side.

    A generator that is seeded by four numbers, the last not 0, draws no image of a split: those are seeded by three,
    and NumPy takes missing ones for 0.
    """
    objects = scenes.draw_objects(rng, LAYOUT)
    return objects, scenes.render(objects, size, rng, LAYOUT)


def ask(
    objects: list[Object], asked: Counter[str], rng: np.random.Generator, number: int = scenes.QUESTIONS
) -> list[Question]:
    """Different questions about a scene, half of them short, half answered at length; balanced as ``scenes.ask`` says.

    Args:
        objects: the scene.
        asked: how often each kind, template, and template with answer came up; counted on.
        rng: breaks ties.
        number: of questions; of an odd one, one less are asked.
    """
    return [
        question
        for askers in (SHORT_ASKERS, SENTENCE_ASKERS)
        for question in scenes.ask(objects, asked, rng, askers, number // 2)
    ]
