"""Linear layers of which only some outputs or some inputs exist, with or without a LoRA adapter on them.

An adapted layer (PEFT's) computes ``W x + scaling * B A dropout(x)``: a slice of its outputs slices W and B, a slice of
its inputs W and A, so adapters too are computed only where the plan keeps them. They are float32, so that they can
learn in small steps, and computed in the type of W.

Shape legend: P packed tokens, W columns.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from maskgym.common.errors import InputError

Ranges = Sequence[tuple[int, int]]


def sliced_outputs(linear: Any, x_PW: Tensor, ranges: Ranges) -> Tensor:
    """The output columns in ``ranges`` (ascending, disjoint)."""
    base = _base(linear)
    out = F.linear(x_PW, _rows(base.weight, ranges), None if base.bias is None else _rows(base.bias, ranges))
    for down, up, scaling, dropout in _adapters(linear):
        out = out + scaling * F.linear(F.linear(dropout(x_PW), down), _rows(up, ranges))
    return out


def sliced_inputs(linear: Any, x_PW: Tensor, ranges: Ranges) -> Tensor:
    """The layer on inputs of which only the columns in ``ranges`` (ascending, disjoint) exist.

    Raises:
        InputError: a layer with a bias, which head slots could not share.
    """
    base = _base(linear)
    if base.bias is not None:
        raise InputError("output projections with a bias are not supported: slots could not share it")
    out = F.linear(x_PW, _columns(base.weight, ranges))
    for down, up, scaling, dropout in _adapters(linear):
        out = out + scaling * F.linear(F.linear(dropout(x_PW), _columns(down, ranges)), up)
    return out


def _base(linear: Any) -> nn.Linear:
    return linear.base_layer if hasattr(linear, "base_layer") else linear


def _adapters(linear: Any) -> list[tuple[Tensor, Tensor, float, Any]]:
    """(A, B, scaling, dropout) of each LoRA adapter that is on and not merged into the weight."""
    if not hasattr(linear, "lora_A") or linear.disable_adapters or linear.merged:
        return []
    dtype = linear.base_layer.weight.dtype
    return [
        (
            linear.lora_A[name].weight.to(dtype),
            linear.lora_B[name].weight.to(dtype),
            linear.scaling[name],
            linear.lora_dropout[name],
        )
        for name in linear.active_adapters
        if name in linear.lora_A
    ]


def _rows(weight: Tensor, ranges: Ranges) -> Tensor:
    if _adjacent(ranges):
        return weight[ranges[0][0] : ranges[-1][1]]
    return torch.cat([weight[start:stop] for start, stop in ranges])


def _columns(weight: Tensor, ranges: Ranges) -> Tensor:
    if _adjacent(ranges):
        return weight[:, ranges[0][0] : ranges[-1][1]]
    return torch.cat([weight[:, start:stop] for start, stop in ranges], dim=1)


def _adjacent(ranges: Ranges) -> bool:
    return all(left[1] == right[0] for left, right in pairwise(ranges))
