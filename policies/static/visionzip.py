"""VisionZip (Yang et al., arXiv 2412.04467, CVPR 2025).

Shape legend: B rows, N visual tokens, D hidden width.
"""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from maskgym.backbones.backbone import Backbone
from maskgym.backbones.encodings.encoding import Encoding
from maskgym.backbones.engine.picking import pick
from maskgym.backbones.plans.masks import Masks
from maskgym.backbones.plans.stages import best_tokens
from maskgym.common.errors import InputError
from maskgym.policies.static.counts import Skeleton
from maskgym.policies.static.tower import TowerPlanner


class VisionZipPlanner(TowerPlanner):
    """Keeps the tokens to which the class token attends most, and a few contextual ones that average the rest.

    1. Dominant: the highest attention of the class token, averaged over heads, in the layer the features come from.
    2. Contextual: every s-th of the others, s = floor(others / contextual tokens); each remaining token is averaged
       into the contextual one with the most similar key (keys averaged over heads).
    3. Order: the dominant ones as they stood, then the contextual ones; positions are renumbered.

    Averaged are the tower's features before the projector, where it takes tokens one by one; elsewhere the visual
    tokens. The authors also hand the class token itself to the language model; here its slot goes to one more
    dominant token.

    Args:
        backbone: prices the plans.
        seed: not used; nothing is drawn.
        contextual: their share of the tokens kept; the authors keep 10 of 64, 20 of 128, 30 of 192.
        cls: take the class token's attention, not the mean attention received.

    Raises:
        InputError: a share outside [0, 1).
    """

    def __init__(self, backbone: Backbone, seed: int = 0, contextual: float = 0.15625, cls: bool = True):
        super().__init__(backbone, "visionzip", "features", cls)
        if not 0 <= contextual < 1:
            raise InputError(
                f"visionzip: contextual is {contextual:g}; it must be a share of the kept tokens in [0, 1)"
            )
        self.contextual = contextual

    def fill(self, skeleton: Skeleton, encoding: Encoding, counts_B: Tensor) -> Masks:
        valid_BN = encoding.visual_valid_BN
        dominant_BN, targets_BN = self._split(encoding, counts_B)
        rest_BN = valid_BN & ~dominant_BN & ~targets_BN
        order_BN = torch.arange(valid_BN.shape[1], device=valid_BN.device) + targets_BN * valid_BN.shape[1]
        means, numbers_BM, is_target_BM = pick(self._average(encoding, targets_BN, rest_BN), targets_BN)
        survivors = self.rewritten(encoding, numbers_BM, is_target_BM, means, order_BN)
        return replace(
            skeleton(counts_B), tokens=dominant_BN | targets_BN, survivors=replace(survivors, own=rest_BN.any(1))
        )

    def choose(self, encoding: Encoding, counts_B: Tensor) -> Tensor:
        dominant_BN, targets_BN = self._split(encoding, counts_B)
        return dominant_BN | targets_BN

    def making(self, encoding: Encoding, counts_B: Tensor) -> Tensor:
        saliency, n = self.saliency(encoding), encoding.visual_valid_BN.shape[1]
        targets_B = self._contextual(counts_B)
        comparing_B = 2 * n * targets_B * saliency.keys.shape[2]
        return saliency.flops + comparing_B + self.backbone.family.project_flops(targets_B)

    def _contextual(self, counts_B: Tensor) -> Tensor:
        return (counts_B * self.contextual).round().long().minimum(counts_B - 1)

    def _split(self, encoding: Encoding, counts_B: Tensor) -> tuple[Tensor, Tensor]:
        """(B, N) dominant tokens, and the contextual ones that others are averaged into."""
        valid_BN, targets_B = encoding.visual_valid_BN, self._contextual(counts_B)
        dominant_BN = best_tokens(self.saliency(encoding).received, valid_BN, counts_B - targets_B)
        rest_BN = valid_BN & ~dominant_BN
        step_B = (rest_BN.sum(1) // targets_B.clamp_min(1)).clamp_min(1)
        rank_BN = rest_BN.cumsum(1) - 1
        on_step_BN = rest_BN & (rank_BN % step_B[:, None] == 0)
        return dominant_BN, on_step_BN & (rank_BN // step_B[:, None] < targets_B[:, None])

    def _average(self, encoding: Encoding, targets_BN: Tensor, rest_BN: Tensor) -> Tensor:
        """(B, N, …) at each target the mean of itself and the rest that it resembles most."""
        unit = F.normalize(self.saliency(encoding).keys.float(), dim=-1)
        target_keys, numbers_BM, is_target_BM = pick(unit, targets_BN)
        x = self.mergeable(encoding).float()
        if numbers_BM.shape[1] == 0:
            return x
        alike_BNM = (unit @ target_keys.transpose(1, 2)).masked_fill(~is_target_BM[:, None], -torch.inf)
        owner_BN = numbers_BM.gather(1, alike_BNM.argmax(2))
        index = owner_BN[..., None].expand_as(x)
        sums = x.scatter_add(1, index, x * rest_BN[..., None])
        sizes_BN = torch.ones_like(rest_BN, dtype=x.dtype).scatter_add(1, owner_BN, rest_BN.to(x.dtype))
        return sums / sizes_BN[..., None]
