"""Rules that make plans without training.

Shape legend: B rows, N visual tokens, A flat action length.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from backbones.backbone import Backbone
from backbones.encoding import Encoding
from backbones.masks import Masks
from policies.projection import project


class Planner(Protocol):
    """Whatever chooses plans: a baseline, or a trained controller.

    Attributes:
        name: how it is called in records.
        budgeted: whether it follows the budget; if not, it is evaluated once, at budget 1.
        controller_flops: what choosing a plan costs, charged to the budget.
    """

    name: str
    budgeted: bool

    def plan(self, encoding: Encoding, budgets_B: Tensor) -> Masks: ...

    def controller_flops(self, encoding: Encoding) -> int | Tensor: ...


class FullPlanner:
    """The plain model: every token, head and layer."""

    name = "full"
    budgeted = False

    def __init__(self, backbone: Backbone, seed: int = 0):
        self.backbone = backbone

    def plan(self, encoding: Encoding, budgets_B: Tensor) -> Masks:
        return self.backbone.full(encoding)

    def controller_flops(self, encoding: Encoding) -> int:
        return 0


class RandomPlanner:
    """Random plans that spend the budget: units leave in random order until the plan fits.

    How the cut is split between tokens, heads and layers is random too, a fresh split for every query, so all
    kinds of plans occur, from tokens only to layers only.

    Args:
        backbone: prices the plans.
        seed: of the draws.
    """

    name = "random"
    budgeted = True

    def __init__(self, backbone: Backbone, seed: int = 0):
        self.backbone = backbone
        self.generator = torch.Generator().manual_seed(seed)

    def plan(self, encoding: Encoding, budgets_B: Tensor) -> Masks:
        return random_plans(self.backbone, encoding, budgets_B, self.generator)

    def controller_flops(self, encoding: Encoding) -> int:
        return 0


def random_plans(backbone: Backbone, encoding: Encoding, budgets_B: Tensor, generator: torch.Generator) -> Masks:
    """Plans drawn at given budgets, (B,) each in (0, 1].

    Each axis gets a rate, the three rates a uniform draw from the simplex. Every unit leaves after an exponential
    waiting time of its axis' rate, and units leave in that order until the plan fits.
    """
    layout = backbone.layout
    rows = len(encoding)
    rates_B3 = torch.empty(rows, 3).exponential_(generator=generator)
    rates_B3 = rates_B3 / rates_B3.sum(1, keepdim=True)
    per_axis = torch.tensor([layout.tokens, layout.layers * layout.heads, layout.layers])
    rates_BA = rates_B3.repeat_interleave(per_axis, dim=1).clamp_min(1e-6)
    waits_BA = torch.empty(rows, layout.size).exponential_(generator=generator) / rates_BA
    device = encoding.visual_BND.device
    return project(backbone, backbone.full(encoding), waits_BA.to(device), budgets_B.to(device), encoding)


BASELINES = {planner.name: planner for planner in (FullPlanner, RandomPlanner)}
