"""Small real parts that the tests share: random-weight LLaVAs, their queries, and the shipped backbone."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from datasets import Dataset
from datasets import Image as ImageFeature
from PIL import Image

from backbones import Backbone, EncodingBank, load_backbone
from backbones.families.llava import LlavaFamily
from backbones.tiny import build_tiny
from envs.queries import DatasetQueries

WORDS = ["what color is the shape ?", "is there a red circle in the image ?", "yes no red green blue circle"]


def build(heads: int = 4, kv_heads: int | None = None, seed: int = 0, **options) -> Backbone:
    """A random-weight LLaVA of 16 visual tokens, 3 layers and ``heads`` heads, in evaluation mode."""
    torch.manual_seed(seed)
    model, processor = build_tiny(
        WORDS,
        image_size=16,
        patch_size=4,
        hidden=32,
        layers=3,
        heads=heads,
        kv_heads=kv_heads,
        intermediate=44,
        vision_hidden=32,
        vision_layers=2,
    )
    for parameter in model.parameters():  # larger weights, so that every part matters to the logits
        parameter.data.mul_(1.5)
    model.requires_grad_(False)
    return Backbone(LlavaFamily(model, processor), "test", **options)


@pytest.fixture(scope="session", params=["mha", "gqa", "heads-only"])
def backbone(request) -> Backbone:
    """Every kind of slot: plain heads, grouped key-value heads, and an MLP that ignores the slots."""
    if request.param == "mha":
        return build()
    if request.param == "gqa":
        return build(heads=8, kv_heads=4)
    return build(width="heads", protected_layers=())


@pytest.fixture(scope="session")
def small() -> Backbone:
    return build()


@pytest.fixture(scope="session")
def tiny() -> Backbone:
    """The shipped backbone."""
    return load_backbone("tiny")


def make_dataset(count: int = 12, size: int = 16, seed: int = 0) -> Dataset:
    rng = np.random.default_rng(seed)
    images = [Image.fromarray(rng.integers(0, 256, (size, size, 3), dtype=np.uint8)) for _ in range((count + 1) // 2)]
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


@pytest.fixture
def bank(backbone, source) -> EncodingBank:
    return EncodingBank(backbone, source)


def random_masks(backbone: Backbone, rows: int, seed: int = 0, keep: float = 0.6):
    generator = torch.Generator().manual_seed(seed)
    masks = backbone.layout.unflatten(torch.rand(rows, backbone.layout.size, generator=generator) < keep)
    masks.layers[~masks.layers.any(1), 0] = True
    return masks
