"""Exactness on layouts that nobody chose: sizes, grouping of heads, slots, width and plans are drawn."""

import random

import pytest
import torch

from maskgym.backbones import Backbone
from maskgym.backbones.families.llava import LlavaFamily
from maskgym.backbones.tiny.build import build_tiny
from tests.conftest import WORDS, make_dataset, random_masks
from tests.masked_reference import masked_logits
from tests.test_cost import counted


def draw(seed):
    """A backbone of random sizes, and queries for it."""
    rng = random.Random(seed)
    kv_heads = rng.choice([1, 2, 3, 4])
    heads = kv_heads * rng.choice([1, 2, 3])
    fitting = [slots for slots in range(1, heads + 1) if heads % slots == 0]
    slots = rng.choice([slots for slots in fitting if kv_heads % slots == 0 or slots % kv_heads == 0])
    patch = rng.choice([2, 4, 8])
    torch.manual_seed(seed)
    model, processor = build_tiny(
        WORDS,
        image_size=16,
        patch_size=patch,
        hidden=4 * heads * rng.choice([1, 2]),
        layers=rng.choice([1, 2, 5]),
        heads=heads,
        kv_heads=kv_heads,
        intermediate=rng.randint(slots, 60),
        vision_hidden=16,
        vision_layers=1,
    )
    family = LlavaFamily(model.requires_grad_(False), processor)
    width = rng.choice(["heads", "heads+mlp"])
    return Backbone(family, "drawn", heads=slots, width=width, protected_layers=rng.choice([(), (0,)]))


@pytest.mark.parametrize("seed", range(16))
@pytest.mark.slow
def test_drawn_layouts_are_exact(seed):
    backbone = draw(seed)
    rows = make_dataset(6, seed)
    images = backbone.encode_images([row["image"] for row in rows])
    encoding = backbone.assemble(images, rows["question"][:])
    masks = backbone.restrict(encoding, random_masks(backbone, 6, seed, keep=random.Random(seed).uniform(0.2, 0.9)))
    spent = backbone.cost(encoding, masks).prefill
    with torch.no_grad():
        together, _ = backbone.prefill(encoding, masks)
        for row in range(6):
            one, alone = encoding.rows(torch.tensor([row])), masks[row : row + 1]
            assert torch.allclose(together[row], backbone.prefill(one, alone)[0][0], atol=1e-4, rtol=0)
            assert torch.allclose(together[row], masked_logits(backbone, encoding, masks, row), atol=1e-4, rtol=0)
            assert counted(lambda one=one, alone=alone: backbone.prefill(one, alone)) == int(spent[row])


@pytest.mark.slow
def test_the_draws_differ():
    layouts = {(backbone.layout, backbone.decoder.width, backbone.hidden) for backbone in map(draw, range(16))}
    assert len(layouts) >= 12 and {width for _, width, _ in layouts} == {"heads", "heads+mlp"}
