"""A token step, then a controller for the language model's side that sees only what the first has left.

As AdaLLaVA is combined with PruMerge+ and FastV (Xu et al., arXiv 2503.10905, Table 1): neither knows of the other.

Shape legend: B rows.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from maskgym.backbones.backbone import Backbone
from maskgym.backbones.encodings.encoding import Encoding
from maskgym.backbones.engine.arrange import arrange
from maskgym.backbones.plans.masks import Masks
from maskgym.backbones.plans.plan_cost import laying_out_flops, merging_flops, most_laying_out_flops
from maskgym.common.errors import InputError
from maskgym.policies.planner import Planner, PlannerWrapper, adopted
from maskgym.policies.planning.projection import budget_flops

THEN = " then "
"""Between the two on the command line: ``"prumerge+ then runs/adallava-l"``."""

ATTEMPTS = 6
"""Plans that the controller makes where tokens leave inside the decoder, which it cannot price; all are charged. One
whose plans say what each took to make has a single one."""


class ChainPlanner(PlannerWrapper):
    """Tokens by one planner, heads and layers by another, in a budget for both.

    Args:
        token_planner: chooses tokens, as many as it sets itself.
        llm_planner: chooses heads and layers for what is left; tokens that it drops too are dropped.
        backbone: prices the plans.

    Raises:
        InputError: a token planner that follows the budget, and would leave the other nothing to save.
    """

    def __init__(self, token_planner: Planner, llm_planner: Planner, backbone: Backbone):
        super().__init__(token_planner)
        if self.budgeted:
            raise InputError(
                f"the first part of a chain must set its own number of tokens, but policy {self.name!r} "
                f"follows the budget; give it a share, as in {self.name + '@0.25'!r}"
            )
        self.then, self.backbone = adopted(llm_planner), backbone
        self.name = f"{self.name}{THEN}{self.then.name}"
        self.budgeted, self.signals = self.then.budgeted, (*self.signals, *self.then.signals)

    def plan(self, encoding: Encoding, budgets_B: Tensor) -> Masks:
        """Plans within their budgets.

        Raises:
            InputError: a budget below what the token step and the least that the controller can choose cost.
        """
        budgets_B = budgets_B.to(encoding.visual_BND.device, torch.float64)
        first = self.planner.plan(encoding, torch.ones_like(budgets_B))
        looking_B, later_B = self._laying_out_flops(encoding, first)
        first = _charged(first, looking_B)
        left = replace(arrange(encoding, first).encoding, visual_valid_BN=first.tokens)
        if not self.budgeted:
            return self._joined(first, self.then.plan(left, torch.ones_like(budgets_B)))
        full_B = self.backbone.full_llm_flops(encoding)
        spent_B = self.backbone.cost(encoding, first, self.planner.controller_flops(encoding)).controller + later_B
        # the controller prices plans for what it sees, without stages
        seen_B = self.backbone.full_llm_flops(left)
        share_B = (budget_flops(budgets_B, full_B) - spent_B) / seen_B
        self._check(share_B, budgets_B, spent_B / full_B)
        if not first.stages:
            return self._joined(first, self.then.plan(left, share_B.clamp_max(1)))
        more_B = (ATTEMPTS - 1) * torch.as_tensor(self.then.planning_flops(left), device=full_B.device)
        share_B = share_B - more_B / seen_B
        self._check(share_B, budgets_B, (spent_B + more_B) / full_B)
        low_B = share_B.clamp_max(1)
        second = self.then.plan(left, low_B)
        if second.making is not None:
            return self._joined(first, second)
        return self._search(encoding, left, _charged(first, more_B), second, low_B, budgets_B)

    def controller_flops(self, encoding: Encoding) -> int | Tensor:
        return self.planner.controller_flops(encoding) + self.then.controller_flops(encoding)

    def planning_flops(self, encoding: Encoding) -> int | Tensor:
        return self.planner.planning_flops(encoding) + self.then.planning_flops(encoding)

    def _laying_out_flops(self, encoding: Encoding, first: Masks) -> tuple[Tensor, Tensor]:
        """(B,) FLOPs of merging tokens for the controller to see, which is done again when the plan runs, and how much
        more laying out can cost then, if the controller drops tokens."""
        kept_B, available_B = first.tokens.sum(1), encoding.visual_valid_BN.sum(1)
        survivors, shape, text_B = first.survivors, self.backbone.decoder.shape, encoding.text_tokens
        if survivors is None:
            return torch.zeros_like(kept_B), torch.zeros_like(kept_B)
        targets_B = kept_B if survivors.targets is None else (survivors.targets & first.tokens).sum(1)
        now_B = laying_out_flops(shape, survivors, kept_B, targets_B, available_B, text_B)
        most_B = most_laying_out_flops(shape, survivors, available_B, text_B)
        return merging_flops(shape, survivors, kept_B, targets_B, available_B), most_B - now_B

    def _search(
        self, encoding: Encoding, left: Encoding, first: Masks, second: Masks, low_B: Tensor, budgets_B: Tensor
    ) -> Masks:
        """The plan of the largest share that fits, by bisection from one that does: ``second``, of share ``low_B``."""
        limits_B = budget_flops(budgets_B, self.backbone.full_llm_flops(encoding))
        best = self._joined(first, second)
        high_B = torch.ones_like(low_B)
        for attempt in range(ATTEMPTS - 1):
            middle_B = high_B if attempt == 0 else (low_B + high_B) / 2
            tried = self._joined(first, self.then.plan(left, middle_B))
            fits_B = self.backbone.cost(encoding, tried, self.controller_flops(encoding)).llm <= limits_B
            best = tried.where(fits_B, best)
            low_B, high_B = torch.where(fits_B, middle_B, low_B), torch.where(fits_B, high_B, middle_B)
        return best

    def _check(self, share_B: Tensor, budgets_B: Tensor, least_B: Tensor) -> None:
        if bool((share_B <= 0).any()):
            row = int(share_B.argmin())
            raise InputError(
                f"budget {float(budgets_B[row]):g} is below what the token step of policy {self.name!r} alone costs, "
                f"{float(least_B[row]):.4f}; give more"
            )

    def _joined(self, first: Masks, second: Masks) -> Masks:
        """Both plans in one."""
        making = [part.making for part in (first, second) if part.making is not None]
        return replace(
            first,
            tokens=first.tokens & second.tokens,
            heads=second.heads,
            layers=second.layers,
            stages=tuple(sorted((*first.stages, *second.stages), key=lambda stage: stage.layer)),
            making=sum(making[1:], making[0]) if making else None,
            midway=second.midway,
        )


def _charged(masks: Masks, flops_B: Tensor) -> Masks:
    """The plans with more FLOPs of making."""
    making_B = flops_B.expand(len(masks))
    return replace(masks, making=making_B if masks.making is None else masks.making + making_B)
