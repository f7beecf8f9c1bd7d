"""Budgets in milliseconds of prefill, for any planner that follows a budget.

Shape legend: B rows.
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor

from maskgym.backbones.backbone import Backbone
from maskgym.backbones.encodings.encoding import Encoding
from maskgym.backbones.latency_model import LatencyModel
from maskgym.backbones.plans.masks import Masks
from maskgym.common.errors import InputError
from maskgym.policies.planner import Planner, PlannerWrapper
from maskgym.policies.planning.projection import least_share

HALVINGS = 10
ATTEMPTS = HALVINGS + 2
"""Plans made for each query: at the largest share, at each halving, and at the largest share known to be fast enough
(the smallest of all, if none is)."""


class MillisecondPlanner(PlannerWrapper):
    """Gives another planner the largest budget share whose plan, by a latency model, is fast enough.

    Each query gets the slowest plan within the limit that a bisection over the shares meets; it does not matter that a
    planner may answer a larger share with a faster plan. The controller's own time is not in the limit; its FLOPs are
    charged for every plan that was made, and so are those that a plan says its making took.

    Args:
        planner: makes the plans; one that follows its budget.
        backbone: what they are for.
        latency_model: predicts the prefill.
        milliseconds: the limit of each query's prefill.

    Raises:
        InputError: a limit that is not positive.
    """

    def __init__(self, planner: Planner, backbone: Backbone, latency_model: LatencyModel, milliseconds: float):
        if not 0 < milliseconds < math.inf:
            raise InputError(f"a budget of {milliseconds:g} ms is no time; give milliseconds above 0, such as 2.5")
        super().__init__(planner)
        self.backbone, self.latency_model, self.milliseconds = backbone, latency_model, milliseconds
        self.budgeted, self.notes = False, {**self.notes, "budget_ms": milliseconds}

    def plan(self, encoding: Encoding, budgets_B: Tensor) -> Masks:
        """Plans within the limit, and within ``budgets_B`` as shares."""
        return self.choose(encoding, budgets_B)[0]

    def controller_flops(self, encoding: Encoding) -> int | Tensor:
        more_flops = (ATTEMPTS - 1) * self.planner.planning_flops(encoding)
        return more_flops + self.planner.controller_flops(encoding)

    def planning_flops(self, encoding: Encoding) -> int | Tensor:
        return ATTEMPTS * self.planner.planning_flops(encoding)

    def predict(self, encoding: Encoding, masks: Masks) -> Tensor:
        """(B,) milliseconds of each plan's prefill."""
        return self.latency_model.predict(self.backbone, encoding, masks)

    def choose(self, encoding: Encoding, budgets_B: Tensor) -> tuple[Masks, Tensor]:
        """Plans, and the budget share (B,) at which each was made.

        Args:
            encoding: B queries.
            budgets_B: upper ends of the shares.

        Raises:
            InputError: a query for which no plan is fast enough, or none is made at all.
        """
        high_B = share_B = budgets_B.to(encoding.visual_BND.device, torch.float64)
        low_B = least_share(self.backbone, encoding, self.planner.controller_flops(encoding)).minimum(high_B)
        best: Masks | None = None
        making_B = torch.zeros_like(share_B, dtype=torch.int64)
        best_share_B, slowest_B, fastest_B = share_B, torch.zeros_like(share_B), torch.full_like(share_B, math.inf)
        for attempt in range(ATTEMPTS):
            masks, predicted_B = self._attempt(encoding, share_B)
            making_B = making_B if masks.making is None else making_B + masks.making
            fits_B = predicted_B <= self.milliseconds
            better_B = fits_B & (predicted_B > 0) & (predicted_B >= slowest_B)
            best = masks if best is None else masks.where(better_B, best)
            best_share_B = torch.where(better_B, share_B, best_share_B)
            slowest_B = torch.where(better_B, predicted_B, slowest_B)
            fastest_B = torch.where(predicted_B > 0, fastest_B.minimum(predicted_B), fastest_B)
            low_B, high_B = torch.where(fits_B, share_B, low_B), torch.where(fits_B, high_B, share_B)
            share_B = low_B if attempt == HALVINGS else (low_B + high_B) / 2
        assert best is not None
        if (slowest_B == 0).any():
            self._refuse(encoding, fastest_B.masked_fill(slowest_B > 0, 0), budgets_B)
        return replace(best, making=making_B), best_share_B

    def _attempt(self, encoding: Encoding, share_B: Tensor) -> tuple[Masks, Tensor]:
        """Plans at these shares and their predicted milliseconds (B,).

        A query whose share the planner refuses as too small is at 0 ms: fast enough, and never the slowest.
        """
        try:
            masks = self.planner.plan(encoding, share_B)
            return masks, self.predict(encoding, masks)
        except InputError:
            rows = torch.arange(len(encoding))
            if len(rows) == 1:
                return self.backbone.full(encoding), torch.zeros_like(share_B)
            halves = [self._attempt(encoding.rows(half), share_B[half]) for half in rows.tensor_split(2)]
            return Masks.cat([masks for masks, _ in halves]), torch.cat([predicted_B for _, predicted_B in halves])

    def _refuse(self, encoding: Encoding, fastest_B: Tensor, budgets_B: Tensor) -> None:
        row = int(fastest_B.argmax())
        if math.isinf(fastest_B[row]):  # refused at every share: the planner itself says why
            alone = torch.tensor([row])
            self.predict(encoding.rows(alone), self.planner.plan(encoding.rows(alone), budgets_B[alone]))
        query = f"query {encoding.ids[row]!r}" if encoding.ids else f"the query at row {row}"
        raise InputError(
            f"a budget of {self.milliseconds:g} ms is below the fastest prefill that policy {self.name!r} has for "
            f"{query} on {self.latency_model.device}, {float(fastest_B[row]):.3g} ms; give more"
        )
