"""The plan to begin with: an even grid of visual tokens; then heads leave, and layers last. The same for every query.

Shape legend: A flat action length.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from maskgym.backbones.backbone import Backbone
from maskgym.backbones.encodings.encoding import Encoding
from maskgym.backbones.plans.masks import AXES, MaskLayout, Masks
from maskgym.policies.planner import Planner
from maskgym.policies.planning.projection import project


def even_order(tokens: int) -> Tensor:
    """(tokens,) numbers evenly spaced in (0, 1), such that the tokens above any of them lie evenly over the image: the
    ranks of a low-discrepancy dither, frac(a x + b y) with a = 1 / g and b = 1 / g**2, g the plastic number (Roberts,
    2018); over the reading order, with the golden ratio, where the tokens are not a square."""
    side = math.isqrt(tokens)
    number = torch.arange(tokens, dtype=torch.float64)
    if side * side == tokens:
        dither = number.div(side, rounding_mode="floor") * 0.7548776662466927 + (number % side) * 0.5698402909980532
    else:
        dither = number * 0.6180339887498949
    rank = (dither % 1).argsort().argsort()
    return (rank.float() + 0.5) / tokens


def even_confidence(layout: MaskLayout) -> Tensor:
    """(A,) in which order units leave, from -1 to 1: tokens in their even order; head slots (0.5) when three quarters
    of the tokens are gone, layers (1) after the last token."""
    heads = torch.full((layout.layers * layout.heads,), 0.5)
    return torch.cat([2 * even_order(layout.tokens) - 1, heads, torch.ones(layout.layers)])


class EvenPlanner(Planner):
    """That plan in each budget: what an untrained controller does, at no cost.

    Args:
        backbone: prices the plans.
        seed: not used; nothing is drawn.
        axes: what may be dropped: all of ``AXES``, or some.
    """

    def __init__(self, backbone: Backbone, seed: int = 0, axes: Sequence[str] = AXES):
        self.backbone, self.axes = backbone, axes
        self.name = "even" if tuple(axes) == AXES else f"even-{'-'.join(axes)}"

    def plan(self, encoding: Encoding, budgets_B: Tensor) -> Masks:
        """Plans within their budgets."""
        device = encoding.visual_BND.device
        confidence_BA = even_confidence(self.backbone.layout).to(device).expand(len(encoding), -1)
        full = self.backbone.full(encoding)
        return project(self.backbone, full, confidence_BA, budgets_B.to(device), encoding, axes=self.axes)
