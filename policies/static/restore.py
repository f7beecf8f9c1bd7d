"""RESTORE (Cho et al., arXiv 2606.01711, ICML 2026) on top of another rule.

Shape legend: B rows, N visual tokens, D hidden width.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from maskgym.backbones.backbone import Backbone
from maskgym.backbones.encodings.encoding import Encoding
from maskgym.backbones.plans.masks import Masks
from maskgym.backbones.plans.stages import best_tokens
from maskgym.policies.static.counts import Skeleton, TokenPlanner
from maskgym.policies.static.diversity import CDPrunerPlanner, DivPrunePlanner
from maskgym.policies.static.plain import RandomTokenPlanner, StridePlanner

BASES: dict[str, Callable[[Backbone, int], TokenPlanner]] = {
    "divprune": DivPrunePlanner,
    "cdpruner": CDPrunerPlanner,
    "stride": StridePlanner,
    "random": RandomTokenPlanner,
}


class RestorePlanner(TokenPlanner):
    """Half of the tokens by another rule, as they are; half as anchors, into which all that is dropped is merged.

    Anchors are dense and distinct: tokens whose summed similarity to the others is high, times one minus the
    similarity to the nearest token that is denser still. Every dropped token goes into the anchor that it resembles
    most. Positions are
    restored: each group stands at the median of its members, and attention makes up for size and distance
    (``maskgym.backbones.engine.calibration``). The published form of ``@restored``, which merges into
    whatever a rule keeps.

    Args:
        backbone: prices the plans.
        seed: of the base, if it draws.
        base: chooses the first half; the authors take DivPrune, HoloV or VisPruner.
    """

    positions = "restored"

    def __init__(
        self, backbone: Backbone, seed: int = 0, base: Literal["divprune", "cdpruner", "stride", "random"] = "divprune"
    ):
        super().__init__(backbone, "restore")
        self.base = BASES[base](backbone, seed)

    def fill(self, skeleton: Skeleton, encoding: Encoding, counts_B: Tensor) -> Masks:
        pure_BN, anchors_BN = self._halves(encoding, counts_B)
        plans = skeleton(counts_B)
        assert plans.survivors is not None
        return replace(plans, tokens=pure_BN | anchors_BN, survivors=replace(plans.survivors, targets=anchors_BN))

    def skeleton(self, encoding: Encoding) -> Skeleton:
        """The first half of what is kept are no targets of merging, which its price depends on."""
        plain, rank_BN = super().skeleton(encoding), encoding.visual_valid_BN.cumsum(1)

        def plans(counts_B: Tensor) -> Masks:
            masks = plain(counts_B)
            assert masks.survivors is not None
            targets_BN = masks.tokens & (rank_BN > (counts_B // 2)[:, None])
            return replace(masks, survivors=replace(masks.survivors, targets=targets_BN))

        return plans

    def choose(self, encoding: Encoding, counts_B: Tensor) -> Tensor:
        pure_BN, anchors_BN = self._halves(encoding, counts_B)
        return pure_BN | anchors_BN

    def making(self, encoding: Encoding, counts_B: Tensor) -> Tensor:
        _, n, width = encoding.visual_BND.shape
        return 2 * n * n * width + self.base.making(encoding, counts_B // 2) * (counts_B > 1)

    def _halves(self, encoding: Encoding, counts_B: Tensor) -> tuple[Tensor, Tensor]:
        """(B, N) the tokens that stay as they are, and the anchors."""
        pure_BN = torch.zeros_like(encoding.visual_valid_BN)
        if bool((counts_B > 1).any()):
            pure_BN = self.base.choose(encoding, (counts_B // 2).clamp_min(1)) & (counts_B > 1)[:, None]
        rest_BN = encoding.visual_valid_BN & ~pure_BN
        return pure_BN, best_tokens(distinctness(encoding.visual_BND, rest_BN), rest_BN, counts_B - counts_B // 2)


def distinctness(x_BND: Tensor, among_BN: Tensor) -> Tensor:
    """(B, N) how dense a token's surroundings are among some, times how far the nearest denser one is; by cosine."""
    unit_BND = F.normalize(x_BND.float(), dim=-1)
    alike_BNN = unit_BND @ unit_BND.transpose(1, 2)
    density_BN = (alike_BNN * among_BN[:, None]).sum(2)
    denser_BNN = (density_BN[:, None] > density_BN[:, :, None]) & among_BN[:, None]
    nearest_BN = alike_BNN.masked_fill(~denser_BNN, -torch.inf).amax(2)
    nearest_BN = torch.where(denser_BNN.any(2), nearest_BN, 0.0)
    return density_BN * (1 - nearest_BN)
