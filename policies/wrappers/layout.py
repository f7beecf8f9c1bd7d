"""How the visual tokens that a planner keeps are laid out: ``@merge``, ``@original``, ``@renumbered``, ``@restored``.

Shape legend: B rows.
"""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from maskgym.backbones.backbone import Backbone
from maskgym.backbones.encodings.encoding import Encoding
from maskgym.backbones.plans.masks import Masks
from maskgym.backbones.plans.plan_cost import most_laying_out_flops
from maskgym.backbones.plans.survivors import POSITIONS, Survivors
from maskgym.common.errors import InputError
from maskgym.policies.planner import Planner, PlannerWrapper

MERGE = "merge"


class LaidOutPlanner(PlannerWrapper):
    """Lays out what another planner keeps before the language model.

    Args:
        planner: chooses; a baseline or a trained controller.
        backbone: prices the plans.
        positions: one of ``maskgym.backbones.plans.survivors.POSITIONS``; None: as the planner has them.
        merge: average dropped tokens into the kept ones that they resemble.
    """

    def __init__(self, planner: Planner, backbone: Backbone, positions: str | None = None, merge: bool = False):
        super().__init__(planner)
        self.backbone, self.positions, self.merge = backbone, positions, merge
        words = [MERGE] * merge + ([] if positions is None else [positions])
        self.name = "@".join([self.name, *words])

    def plan(self, encoding: Encoding, budgets_B: Tensor) -> Masks:
        """Plans within their budgets, what laying out may cost at most kept back.

        Raises:
            InputError: plans that drop tokens inside the decoder, or merge them by a rule of their own.
        """
        if self.budgeted:
            full_B, visual_B = self.backbone.full_llm_flops(encoding), encoding.visual_valid_BN.sum(1)
            asked, shape = self._asked_layout(encoding), self.backbone.decoder.shape
            most_B = most_laying_out_flops(shape, asked, visual_B, encoding.text_tokens)
            budgets_B = budgets_B.to(full_B.device).double() - most_B / full_B
        masks = self.planner.plan(encoding, budgets_B)
        if masks.stages:
            raise InputError(
                f"policy {self.planner.name!r} drops visual tokens inside the decoder; what is laid out are those that "
                f"are dropped before it: leave out {self._asked()}"
            )
        return replace(masks, survivors=self._survivors(masks, encoding))

    def _survivors(self, masks: Masks, encoding: Encoding) -> Survivors:
        own, asked = masks.survivors, self._asked_layout(encoding)
        if own is None:
            return asked
        if bool(own.own.any()) and bool(asked.merged.any()):
            raise InputError(
                f"policy {self.planner.name!r} merges tokens by a rule of its own; leave out {self._asked()}"
            )
        if self.positions is None:
            return replace(own, merged=own.merged | asked.merged)
        return replace(own, positions=asked.positions, merged=own.merged | asked.merged)

    def _asked_layout(self, encoding: Encoding) -> Survivors:
        return Survivors.plain(len(encoding), self.positions or "original", self.merge, encoding.visual_BND.device)

    def _asked(self) -> str:
        return " and ".join(["--merge"] * self.merge + [f"--positions {self.positions}"] * (self.positions is not None))


__all__ = ["MERGE", "POSITIONS", "LaidOutPlanner"]
