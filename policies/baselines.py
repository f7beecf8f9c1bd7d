"""Rules that make plans without training.

Shape legend: B rows, N visual tokens, A flat action length.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from maskgym.backbones.backbone import Backbone
from maskgym.backbones.encodings.encoding import Encoding
from maskgym.backbones.plans.masks import AXES, Masks
from maskgym.policies.planner import Planner
from maskgym.policies.planning.even import EvenPlanner
from maskgym.policies.planning.projection import project
from maskgym.policies.static import STATIC


class FullPlanner(Planner):
    """The plain model: every token, head and layer."""

    name = "full"
    budgeted = False

    def __init__(self, backbone: Backbone, seed: int = 0):
        self.backbone = backbone

    def plan(self, encoding: Encoding, budgets_B: Tensor) -> Masks:
        return self.backbone.full(encoding)


class RandomPlanner(Planner):
    """Random plans that spend the budget: units leave in random order until the plan fits.

    How the cut is split between tokens, heads and layers is random too, a fresh split for every query, so all
    kinds of plans occur, from tokens only to layers only.

    Args:
        backbone: prices the plans.
        seed: of the draws.
        axes: what may be dropped: all of ``AXES``, or some.
    """

    def __init__(self, backbone: Backbone, seed: int = 0, axes: Sequence[str] = AXES):
        self.backbone, self.axes = backbone, axes
        self.name = "random" if tuple(axes) == AXES else f"random-{'-'.join(axes)}"
        self.generator = torch.Generator().manual_seed(seed)

    def plan(self, encoding: Encoding, budgets_B: Tensor) -> Masks:
        """Plans within their budgets.

        Raises:
            InputError: a budget that dropping all of these axes does not reach.
        """
        return random_plans(self.backbone, encoding, budgets_B, self.generator, self.axes)


def random_plans(
    backbone: Backbone,
    encoding: Encoding,
    budgets_B: Tensor,
    generator: torch.Generator,
    axes: Sequence[str] = AXES,
) -> Masks:
    """Plans drawn at given budgets, (B,) each in (0, 1].

    Units leave in the order of their waiting times (``random_waits``) until the plan fits.

    Raises:
        InputError: a budget that dropping all of these axes does not reach.
    """
    waits_BA = random_waits(backbone, len(encoding), generator, axes)
    device = encoding.visual_BND.device
    full = backbone.full(encoding)
    return project(backbone, full, waits_BA.to(device), budgets_B.to(device), encoding, axes=axes)


def random_waits(
    backbone: Backbone,
    rows: int,
    generator: torch.Generator,
    axes: Sequence[str] = AXES,
    sharpness: float = 1.0,
) -> Tensor:
    """(rows, A) when each unit leaves, of the axes that may; the others' numbers mean nothing.

    Each axis gets a rate, the rates a uniform draw from the simplex; a sharpness above 1 brings them nearer to one axis
    alone (each is raised to this power). Every unit leaves after an exponential waiting time of its axis' rate.
    """
    layout = backbone.layout
    allowed_3 = torch.tensor([axis in axes for axis in AXES])
    rates_B3 = torch.empty(rows, 3).exponential_(generator=generator) ** sharpness * allowed_3
    rates_B3 = rates_B3 / rates_B3.sum(1, keepdim=True)
    per_axis = torch.tensor([layout.tokens, layout.layers * layout.heads, layout.layers])
    rates_BA = rates_B3.repeat_interleave(per_axis, dim=1)
    return torch.empty(rows, layout.size).exponential_(generator=generator) / rates_BA.clamp_min(1e-6)


BASELINES: dict[str, Callable[..., Planner]] = {
    "full": FullPlanner,
    "random": partial(RandomPlanner, axes=AXES),
    "even": partial(EvenPlanner, axes=AXES),
    **{f"random-{axis}": partial(RandomPlanner, axes=(axis,)) for axis in AXES[1:]},
    **STATIC,
}
"""By the name on the command line; each takes a backbone, a seed, and perhaps options."""
