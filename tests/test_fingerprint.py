"""A fingerprint stays when weights are rounded, moved or renamed, and changes when they are trained or are others'."""

import copy

import torch
from torch import nn

from maskgym.backbones.loading.fingerprint import SAMPLE, fingerprint
from tests.conftest import build


def test_every_dtype_has_the_same(small):
    prints = {fingerprint(copy.deepcopy(small.model).to(dtype)) for dtype in (torch.float32, torch.bfloat16)}
    prints.add(fingerprint(copy.deepcopy(small.model).to(torch.bfloat16).to(torch.float16)))
    assert prints == {fingerprint(build().model)} and all(len(each) == 32 for each in prints)


def test_numbers_too_small_for_float16_keep_their_sign():
    linear = nn.Linear(64, 64)
    with torch.no_grad():
        linear.weight.mul_(1e-9)
    assert not copy.deepcopy(linear).half().weight.any()
    assert fingerprint(copy.deepcopy(linear).half()) == fingerprint(linear)


def test_other_weights_have_another(small):
    assert fingerprint(build(seed=1).model) != fingerprint(small.model)


def test_a_little_training_of_one_layer_is_seen(small):
    """A hundredth of the size of the weights: of 1024 some change sign."""
    changed = copy.deepcopy(small.model)
    weight = changed.model.language_model.layers[1].self_attn.q_proj.weight
    torch.manual_seed(0)
    with torch.no_grad():
        weight.add_(1e-2 * weight.std() * torch.randn_like(weight))
    assert fingerprint(changed) != fingerprint(small.model)


def test_names_and_order_do_not_matter_but_shapes_do():
    torch.manual_seed(0)
    one, other = nn.Linear(8, 4, bias=False), nn.Linear(4, 8, bias=False)
    assert fingerprint(nn.Sequential(one, other)) == fingerprint(nn.ModuleDict({"b": other, "a": one}))
    turned = nn.Linear(4, 8, bias=False)
    turned.weight = nn.Parameter(one.weight.detach().reshape(8, 4))
    assert fingerprint(nn.Sequential(turned, other)) != fingerprint(nn.Sequential(one, other))


def test_of_large_tensors_a_sample_is_read():
    """Of 3 x SAMPLE weights every third: a change between two of them is not seen, a change at one of them is."""
    torch.manual_seed(0)
    first = nn.ParameterList([torch.randn(3 * SAMPLE)])
    skipped, read = copy.deepcopy(first), copy.deepcopy(first)
    with torch.no_grad():
        skipped[0][4] *= -1
        read[0][6] *= -1
    assert fingerprint(skipped) == fingerprint(first) != fingerprint(read)
