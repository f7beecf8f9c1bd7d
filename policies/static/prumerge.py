"""LLaVA-PruMerge and PruMerge+ (Shang et al., arXiv 2403.15388, ICCV 2025).

Shape legend: B rows, N visual tokens, K kept tokens of the row with most, C tower width, D hidden width.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from maskgym.backbones.backbone import Backbone
from maskgym.backbones.encodings.encoding import Encoding
from maskgym.backbones.engine.picking import pick
from maskgym.backbones.plans.masks import Masks
from maskgym.backbones.plans.stages import best_tokens
from maskgym.policies.static.counts import Skeleton
from maskgym.policies.static.plain import evenly_spaced
from maskgym.policies.static.tower import TowerPlanner


class PruMergePlanner(TowerPlanner):
    """Keeps the tokens to which the class token attends unusually much, and merges their neighbours into them.

    1. Kept are the outliers of the class token's attention a in the tower's last layer: a > Q3 + 1.5 (Q3 - Q1), the
       quartiles taken image by image. PruMerge+ adds a grid: every floor(floor(1 / r) / 3)-th token, r the outliers'
       share.
    2. To each kept token are added its ``neighbours`` most similar tokens, kept or not, by keys, each times its a.
    3. One more token sums up what is not kept, each times its a.
    4. Order: outliers by falling a, the grid, the summary; positions are renumbered.

    As in the authors' code, the weights of 2 and 3 are not normalised, and merged are the tower's features before the
    projector (where it takes tokens one by one; elsewhere the visual tokens). The authors take the quartiles over a
    whole batch; here every image has its own. An image without outliers keeps the token with most attention.

    Args:
        backbone: prices the plans.
        seed: not used; nothing is drawn.
        count: ``image``: as many tokens as the image gives, as published; ``budget``: as many as the budget pays for,
            chosen by attention, and for PruMerge+ half of them by an even grid over the rest, as in the authors'
            training.
        neighbours: merged into each kept token.
        plus: PruMerge+.
        cls: take the class token's attention, not the mean attention received.
    """

    def __init__(
        self,
        backbone: Backbone,
        seed: int = 0,
        count: Literal["image", "budget"] = "image",
        neighbours: int = 32,
        plus: bool = False,
        cls: bool = True,
    ):
        super().__init__(backbone, "prumerge+" if plus else "prumerge", "last", cls)
        self.count, self.neighbours, self.plus = count, neighbours, plus
        self.budgeted = count == "budget"

    def plan(self, encoding: Encoding, budgets_B: Tensor) -> Masks:
        """Plans; with ``count="image"`` whatever the budget."""
        if self.count == "budget":
            return super().plan(encoding, budgets_B)
        kept_BN, order_BN = self._outliers(encoding)
        return self._compress(encoding, kept_BN, order_BN, torch.ones_like(kept_BN[:, 0]))

    def fill(self, skeleton: Skeleton, encoding: Encoding, counts_B: Tensor) -> Masks:
        return self._compress(encoding, *self._most_attended(encoding, counts_B), counts_B > 1)

    def choose(self, encoding: Encoding, counts_B: Tensor) -> Tensor:
        return self._most_attended(encoding, counts_B)[0]

    def making(self, encoding: Encoding, counts_B: Tensor) -> Tensor:
        kept_B = torch.where(counts_B < encoding.visual_valid_BN.sum(1), (counts_B - 1).clamp_min(1), counts_B)
        return self._flops(encoding, kept_B)

    def _flops(self, encoding: Encoding, kept_B: Tensor) -> Tensor:
        """(B,) attention of the class token, similarities of the kept tokens, the merging, and the projector again."""
        saliency, n = self.saliency(encoding), encoding.visual_valid_BN.shape[1]
        flops_B = torch.as_tensor(saliency.flops) + 2 * kept_B * n * saliency.keys.shape[2]
        flops_B = flops_B + 2 * (kept_B + 1) * n * self.mergeable(encoding).shape[2]
        return flops_B + self.backbone.family.project_flops(kept_B + 1)

    def _outliers(self, encoding: Encoding) -> tuple[Tensor, Tensor]:
        """(B, N) the tokens kept, and the order in which they stand."""
        valid_BN, received_BN = encoding.visual_valid_BN, self.saliency(encoding).received
        quartiles_2B = received_BN.masked_fill(~valid_BN, torch.nan).nanquantile(
            received_BN.new_tensor([0.25, 0.75]), 1
        )
        fence_B = quartiles_2B[1] + 1.5 * (quartiles_2B[1] - quartiles_2B[0])
        counts_B = (valid_BN & (received_BN > fence_B[:, None])).sum(1).clamp_min(1)
        chosen_BN = best_tokens(received_BN, valid_BN, counts_B)
        grid_BN = self._grid(valid_BN, counts_B) & ~chosen_BN if self.plus else torch.zeros_like(chosen_BN)
        return chosen_BN | grid_BN, self._order(received_BN, grid_BN)

    def _grid(self, valid_BN: Tensor, counts_B: Tensor) -> Tensor:
        """(B, N) every floor(floor(1 / r) / 3)-th token but the last; every one where r is above a sixth."""
        most_B = valid_BN.sum(1)
        step_B = (most_B // counts_B // 3).clamp_min(1)
        numbers_N = torch.arange(valid_BN.shape[1], device=valid_BN.device)
        return (numbers_N % step_B[:, None] == 0) & (numbers_N < (most_B - 1)[:, None])

    def _most_attended(self, encoding: Encoding, counts_B: Tensor) -> tuple[Tensor, Tensor]:
        """As ``_outliers``: one fewer than ``counts_B`` tokens, to which the summary comes; all, if that is all."""
        valid_BN, received_BN = encoding.visual_valid_BN, self.saliency(encoding).received
        kept_B = torch.where(counts_B < valid_BN.sum(1), counts_B - 1, counts_B).clamp_min(1)
        by_grid_B = kept_B // 2 if self.plus else torch.zeros_like(kept_B)
        chosen_BN = best_tokens(received_BN, valid_BN, kept_B - by_grid_B)
        grid_BN = evenly_spaced(valid_BN & ~chosen_BN, by_grid_B)
        return chosen_BN | grid_BN, self._order(received_BN, grid_BN)

    def _order(self, received_BN: Tensor, grid_BN: Tensor) -> Tensor:
        """(B, N) float: by falling attention, below 0; then the grid, from 0 on."""
        places_N = torch.arange(grid_BN.shape[1], device=grid_BN.device, dtype=received_BN.dtype)
        return torch.where(grid_BN, places_N, -received_BN)

    def _compress(self, encoding: Encoding, kept_BN: Tensor, order_BN: Tensor, summarised_B: Tensor) -> Masks:
        """Plans that keep these tokens, neighbours merged in, and the summary where the last dropped one was."""
        dropped_BN = encoding.visual_valid_BN & ~kept_BN
        numbers_BK, is_kept_BK, weights_BKN = self._weights(encoding, kept_BN)
        summary_B1N = (self.saliency(encoding).received * dropped_BN)[:, None]
        merged = torch.cat([weights_BKN, summary_B1N], dim=1) @ self.mergeable(encoding).float()
        slot_B1 = dropped_BN.long().cumsum(1).argmax(1, keepdim=True)
        any_B1 = dropped_BN.any(1, keepdim=True)
        has_summary_B1 = any_B1 & summarised_B[:, None]
        last = torch.finfo(order_BN.dtype).max
        order_BN = torch.where(has_summary_B1, order_BN.scatter(1, slot_B1, last), order_BN)
        survivors = self.rewritten(
            encoding,
            torch.cat([numbers_BK, slot_B1], dim=1),
            torch.cat([is_kept_BK, has_summary_B1], dim=1),
            merged,
            order_BN,
        )
        tokens_BN = kept_BN | torch.zeros_like(kept_BN).scatter(1, slot_B1, has_summary_B1)
        making_B = self._flops(encoding, kept_BN.sum(1)) * any_B1[:, 0]
        survivors = replace(survivors, own=any_B1[:, 0])
        return replace(self.backbone.full(encoding), tokens=tokens_BN, survivors=survivors, making=making_B)

    def _weights(self, encoding: Encoding, kept_BN: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Numbers (B, K) of the kept tokens, which of them are there, and (B, K, N) what each is the sum of."""
        saliency, n = self.saliency(encoding), kept_BN.shape[1]
        unit = F.normalize(saliency.keys.float(), dim=-1)
        kept, numbers_BK, is_kept_BK = pick(unit, kept_BN)
        alike_BKN = kept @ unit.transpose(1, 2)
        others_BKN = encoding.visual_valid_BN[:, None].expand_as(alike_BKN).clone()
        others_BKN.scatter_(2, numbers_BK[..., None], False)
        near_BKN = alike_BKN.masked_fill(~others_BKN, -torch.inf).argsort(dim=2, descending=True, stable=True)
        near_BKN = near_BKN[..., : min(self.neighbours, n - 1)]
        received_BKN = (saliency.received[:, None] * others_BKN).gather(2, near_BKN)
        weights_BKN = torch.zeros_like(alike_BKN).scatter(2, near_BKN, received_BKN)
        return numbers_BK, is_kept_BK, weights_BKN.scatter(2, numbers_BK[..., None], 1.0)
