"""Rules whose only knob is how many visual tokens are kept: the budget, or a share of the tokens, sets it.

Shape legend: B rows, N visual tokens.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from maskgym.backbones.backbone import Backbone
from maskgym.backbones.encodings.encoding import Encoding
from maskgym.backbones.plans.masks import Masks
from maskgym.backbones.plans.survivors import Survivors
from maskgym.common.errors import InputError
from maskgym.policies.planner import Planner
from maskgym.policies.planning.bisection import most_that_fits
from maskgym.policies.planning.projection import budget_flops

Skeleton = Callable[[Tensor], Masks]
"""Plans for some counts (B,) that cost what the real ones will, whichever tokens these keep."""


class CountPlanner(Planner):
    """Plans that keep as many visual tokens as the budget pays for, the cost of choosing them included.

    Args:
        backbone: prices the plans.
        name: in records.

    Attributes:
        positions: how the authors lay out what is kept; see ``maskgym.backbones.plans.survivors``.
    """

    positions = "original"

    def __init__(self, backbone: Backbone, name: str):
        self.backbone, self.name = backbone, name
        backbone.listen(self.signals)

    def plan(self, encoding: Encoding, budgets_B: Tensor) -> Masks:
        """Plans within their budgets.

        Raises:
            InputError: a budget that keeping a single token already exceeds.
        """
        skeleton = self.skeleton(encoding)
        return self._filled(skeleton, encoding, self.counts(skeleton, encoding, budgets_B))

    def plan_counts(self, encoding: Encoding, counts_B: Tensor) -> Masks:
        """Plans that keep so many visual tokens each, or all that the image has."""
        return self._filled(self.skeleton(encoding), encoding, counts_B.minimum(encoding.visual_valid_BN.sum(1)))

    def _filled(self, skeleton: Skeleton, encoding: Encoding, counts_B: Tensor) -> Masks:
        """The real plans; where all tokens of all images are kept there is nothing to choose, nor to compute."""
        if bool((counts_B == encoding.visual_valid_BN.sum(1)).all()):
            return skeleton(counts_B)
        return self.fill(skeleton, encoding, counts_B)

    @abstractmethod
    def skeleton(self, encoding: Encoding) -> Skeleton:
        """What plans for these queries cost, at any counts from 1 to what the images have."""

    @abstractmethod
    def fill(self, skeleton: Skeleton, encoding: Encoding, counts_B: Tensor) -> Masks:
        """The real plans for some counts."""

    def shares(self, encoding: Encoding, share: float) -> Tensor:
        """(B,) counts that keep a share of each image's tokens, at least one.

        Raises:
            InputError: a share outside (0, 1].
        """
        if not 0 < share <= 1:
            raise InputError(f"a share of {share:g} of the visual tokens is outside (0, 1]; give one such as 0.25")
        return (encoding.visual_valid_BN.sum(1) * share).round().long().clamp_min(1)

    def counts(self, skeleton: Skeleton, encoding: Encoding, budgets_B: Tensor) -> Tensor:
        """(B,) the most tokens that each budget pays for."""
        most_B = encoding.visual_valid_BN.sum(1)
        full_B = self.backbone.full_llm_flops(encoding)
        limits_B = budget_flops(budgets_B.to(full_B.device), full_B)

        def flops(counts_B: Tensor) -> Tensor:
            return self.backbone.cost(encoding, skeleton(counts_B)).llm

        # Keeping all needs no choice, so it can cost less than keeping all but one; below, more tokens cost more.
        whole_B = flops(most_B) <= limits_B
        if bool(whole_B.all()):
            return most_B
        least_B = flops(torch.ones_like(most_B)) * ~whole_B
        if bool((least_B > limits_B).any()):
            self._refuse(budgets_B, (least_B.double() + 0.5) / full_B)
        some_B = most_that_fits(
            lambda counts_B: flops(counts_B) <= limits_B, torch.ones_like(most_B), (most_B - 1).clamp_min(1)
        )
        return torch.where(whole_B, most_B, some_B)

    def _refuse(self, budgets_B: Tensor, least_B: Tensor) -> None:
        row = int((least_B - budgets_B.to(least_B.device)).argmax())
        raise InputError(
            f"budget {float(budgets_B[row]):g} is below what policy {self.name!r} can meet{self._why()}; "
            f"the least budget here is {float(least_B[row]):.4f}"
        )

    def _why(self) -> str:
        return ""


class TokenPlanner(CountPlanner):
    """Rules that choose visual tokens before the language model."""

    @abstractmethod
    def choose(self, encoding: Encoding, counts_B: Tensor) -> Tensor:
        """(B, N) bool: the tokens kept, exactly so many of each image's own."""

    def making(self, encoding: Encoding, counts_B: Tensor) -> Tensor:
        """(B,) int64 FLOPs of choosing so many; rows that keep everything are not charged."""
        return torch.zeros_like(counts_B)

    def fill(self, skeleton: Skeleton, encoding: Encoding, counts_B: Tensor) -> Masks:
        return replace(skeleton(counts_B), tokens=self.choose(encoding, counts_B))

    def skeleton(self, encoding: Encoding) -> Skeleton:
        valid_BN = encoding.visual_valid_BN
        rank_BN, most_B = valid_BN.cumsum(1), valid_BN.sum(1)
        full = replace(self.backbone.full(encoding), survivors=self.survivors(encoding))

        def plans(counts_B: Tensor) -> Masks:
            making_B = self.making(encoding, counts_B) * (counts_B < most_B)
            return replace(full, tokens=valid_BN & (rank_BN <= counts_B[:, None]), making=making_B)

        return plans

    def survivors(self, encoding: Encoding) -> Survivors | None:
        """How the kept tokens are laid out; None: where they were."""
        return Survivors.asked(len(encoding), self.positions, merge=False, device=encoding.visual_BND.device)
