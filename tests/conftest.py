"""Small real parts that the tests share: random-weight LLaVAs, their queries, and the shipped backbone."""

from __future__ import annotations

import os
import resource
import sys
from collections.abc import Collection, Iterable
from functools import partial
from typing import Any

# One thread, also in processes that tests start: several wait for each other, spinning, where cores are busy. To be
# said before NumPy and torch are imported.
os.environ |= dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")

import numpy as np
import pytest
import torch
from datasets import Dataset
from datasets import Image as ImageFeature
from PIL import Image

from maskgym.backbones import Backbone, EncodingBank, load_backbone
from maskgym.backbones.families import FAMILIES
from maskgym.backbones.families.llava import LlavaFamily
from maskgym.backbones.tiny.build import build_tiny
from maskgym.envs.data.queries import DatasetQueries
from maskgym.eval import cli
from tests.families import BUILDERS, build_family


def pytest_terminal_summary(terminalreporter):
    """Tests are paid for in CPU-seconds, which a busy machine changes little."""
    if "PYTEST_XDIST_WORKER_COUNT" in os.environ or terminalreporter.config.getoption("numprocesses", None):
        return  # the workers' are not known here
    used = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    terminalreporter.write_line(f"{sum(each.ru_utime + each.ru_stime for each in used):.0f} CPU-seconds")


SHAPES = ((16, 16), (20, 44), (40, 30), (64, 20))
WORDS = ["what color is the shape ?", "is there a red circle in the image ?", "yes no red green blue circle"]


def build(
    heads: int = 4, kv_heads: int | None = None, seed: int = 0, slots: int | None = None, layers: int = 3, **options
) -> Backbone:
    """A random-weight LLaVA of 16 visual tokens, 3 layers and ``heads`` heads, in evaluation mode."""
    torch.manual_seed(seed)
    model, processor = build_tiny(
        WORDS,
        image_size=16,
        patch_size=4,
        hidden=32,
        layers=layers,
        heads=heads,
        kv_heads=kv_heads,
        intermediate=44,
        vision_hidden=32,
        vision_layers=2,
    )
    model.requires_grad_(False)
    return Backbone(LlavaFamily(model, processor), "test", heads=slots, **options)


def build_of(name: str, **options) -> Backbone:
    """A backbone of a tiny model of one family."""
    model, processor = build_family(name)
    return Backbone(FAMILIES[model.config.model_type](model, processor), name, **options)


KINDS = {
    "mha": build,
    "gqa": partial(build, heads=8, kv_heads=4),
    "heads-only": partial(build, width="heads", protected_layers=()),
    "coarse": partial(build, heads=8, slots=2),
    "fine": partial(build, heads=8, kv_heads=2, slots=8),
    "fine-heads-only": partial(build, heads=8, kv_heads=2, slots=4, width="heads"),
    **{name: partial(build_of, name) for name in BUILDERS},
}


def slow_but(fast: Collection[Any], params: Iterable[Any]) -> list[Any]:
    """Parameters of a test, all but the fast ones marked slow."""
    return [each if each in fast else pytest.param(each, marks=pytest.mark.slow) for each in params]


TRIED_FIRST = ("gqa", "qwen2_5_vl")
"""Of the kinds of backbone those that the fast tests take: grouped heads with MLP slices; M-RoPE, any size."""


@pytest.fixture(
    scope="session",
    params=slow_but(TRIED_FIRST, KINDS),
)
def backbone(request) -> Backbone:
    """Every kind of slot (a head, a group on one key-value head, several heads, part of a group, without the MLP), and
    every family."""
    return KINDS[request.param]()


@pytest.fixture(scope="session")
def small() -> Backbone:
    return build()


@pytest.fixture(scope="session")
def tiny() -> Backbone:
    """The shipped backbone."""
    return load_backbone("tiny")


def make_dataset(count: int = 12, seed: int = 0) -> Dataset:
    """Noise images of several shapes, two questions each."""
    rng = np.random.default_rng(seed)
    shapes = [SHAPES[number % len(SHAPES)] for number in range((count + 1) // 2)]
    images = [Image.fromarray(rng.integers(0, 256, (*shape, 3), dtype=np.uint8)) for shape in shapes]
    questions = ["what color is the shape?", "is there a red circle in the image?"]
    answers = ["red", "yes", "blue", "no"]
    rows = {
        "id": [f"q{number}" for number in range(count)],
        "image": [images[number // 2] for number in range(count)],
        "question": [questions[number % 2] for number in range(count)],
        "answers": [[answers[number % 4]] for number in range(count)],
    }
    return Dataset.from_dict(rows).cast_column("image", ImageFeature())


@pytest.fixture(scope="session")
def source() -> DatasetQueries:
    return DatasetQueries(make_dataset(), "made", "train")


@pytest.fixture(scope="session")
def place(tmp_path_factory):
    """A backbone and a data set on disk, as a user brings them."""
    folder = tmp_path_factory.mktemp("place")
    backbone = build()
    backbone.model.save_pretrained(folder / "vlm")
    backbone.processor.save_pretrained(folder / "vlm")
    make_dataset(12).save_to_disk(folder / "data")
    return folder


@pytest.fixture(scope="session")
def desk(place):
    """``place`` with a finished run, and with files that are not what they should be."""
    from tests.refusals import lay_out_desk  # imports the trainings, which takes seconds

    return lay_out_desk(place)


def command(monkeypatch, main, *arguments):
    """Run a command as from the shell."""
    monkeypatch.setattr(sys, "argv", ["command", *map(str, arguments)])
    cli.run(main)


@pytest.fixture
def bank(backbone, source) -> EncodingBank:
    return EncodingBank(backbone, source)


def random_masks(backbone: Backbone, rows: int, seed: int = 0, keep: float = 0.6):
    generator = torch.Generator().manual_seed(seed)
    masks = backbone.layout.unflatten(torch.rand(rows, backbone.layout.size, generator=generator) < keep)
    masks.layers[~masks.layers.any(1), 0] = True
    return masks
