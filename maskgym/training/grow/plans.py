"""What random plans make of a batch whose questions share an image.

Shape legend: K plans of a pool, B images, N visual tokens, L layers, H finest head slots, Q query heads, I MLP columns,
S places, P places of the prefix, D hidden width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from maskgym.backbones.engine.arrange import group_medians, group_sizes
from maskgym.training.coherent import RESTORED_SHARE, draw_orders
from maskgym.training.grow.dense import DenseGates

FORBIDDEN = -1e4
"""Added to the logits of attention where nobody may look."""


@dataclass(frozen=True)
class Pool:
    """Random plans: how many tokens they keep, and which heads and layers; those with the largest budgets first.

    Attributes:
        tokens_K: visual tokens kept.
        heads_KLQ: bool: query heads kept; none of a dropped layer.
    """

    tokens_K: Tensor
    heads_KLQ: Tensor

    def __len__(self) -> int:
        return len(self.tokens_K)

    def to(self, device: torch.device | str) -> Pool:
        return Pool(self.tokens_K.to(device), self.heads_KLQ.to(device))

    def save(self, path: Any) -> None:
        np.savez_compressed(path, tokens=self.tokens_K.numpy(), heads=np.packbits(self.heads_KLQ.numpy(), axis=-1))

    @classmethod
    def load(cls, path: Any, query_heads: int) -> Pool:
        with np.load(path, allow_pickle=False) as stored:
            heads = np.unpackbits(stored["heads"], axis=-1)[..., :query_heads].astype(bool)
            return cls(torch.from_numpy(stored["tokens"]), torch.from_numpy(heads))


def column_slots(columns: int, query_heads: int) -> Tensor:
    """(I,) the finest head slot that each MLP column goes with."""
    cuts = torch.tensor([columns * slot // query_heads for slot in range(1, query_heads)])
    return torch.bucketize(torch.arange(columns), cuts, right=True)


def gates_of(heads_BLQ: Tensor, columns: int) -> DenseGates:
    """Gates of kept query heads; MLP slices go with them."""
    slots_I = column_slots(columns, heads_BLQ.shape[2]).to(heads_BLQ.device)
    return DenseGates(heads_BLQ, heads_BLQ[..., slots_I])


@dataclass(frozen=True)
class Laid:
    """A batch as plans lay it out.

    Attributes:
        visual_BND: visual tokens, merged where the plan says so.
        positions_BS: rotary positions.
        first_bias_BSS, bias_BSS: of attention in the first layer, and in the others.
    """

    visual_BND: Tensor
    positions_BS: Tensor
    first_bias_BSS: Tensor
    bias_BSS: Tensor


def seen_from(owner_BS: Tensor, prefix: int) -> Tensor:
    """(B, S, S) bool: places see the prefix and their own question, up to themselves."""
    owner_BS = F.pad(owner_BS, (prefix, 0), value=-1)
    return ((owner_BS[:, None] == -1) | (owner_BS[:, None] == owner_BS[..., None])).tril()


def lay_out_full(visual_BND: Tensor, owner_BS: Tensor, positions_BS: Tensor, before: int) -> Laid:
    """The batch with everything kept.

    Args:
        visual_BND: visual tokens.
        owner_BS: the question of each place behind the prefix.
        positions_BS: of all places.
        before: text tokens before the visual ones.
    """
    seen_BSS = seen_from(owner_BS, before + visual_BND.shape[1])
    bias_BSS = torch.zeros(seen_BSS.shape, device=seen_BSS.device).masked_fill(~seen_BSS, FORBIDDEN)
    return Laid(visual_BND, positions_BS, bias_BSS, bias_BSS)


def lay_out(full: Laid, kept_BN: Tensor, restored_B: Tensor, answer_BS: Tensor, before: int, rates_R: Tensor) -> Laid:
    """The batch with some visual tokens kept, the others merged into them in some rows (``Survivors``, restored).

    Args:
        full: with everything kept.
        kept_BN: bool.
        restored_B: bool: rows that merge; those that keep every token are left as they are.
        answer_BS: bool: places of answers, of all places; they see sizes but no distances (``Calibration``).
        before: text tokens before the visual ones.
        rates_R: rotary frequencies.
    """
    tokens = kept_BN.shape[1]
    visual = slice(before, before + tokens)
    restored_B = restored_B & ~kept_BN.all(1)
    unit_BND = F.normalize(full.visual_BND.float(), dim=-1)
    alike_BNN = (unit_BND @ unit_BND.transpose(1, 2)).masked_fill(~kept_BN[:, None], -torch.inf)
    own_BN = torch.arange(tokens, device=kept_BN.device).expand_as(kept_BN)
    owner_BN = torch.where(kept_BN, own_BN, alike_BNN.argmax(2))
    valid_BN = torch.ones_like(kept_BN)
    sizes_BN = group_sizes(owner_BN, valid_BN)
    sum_BND = torch.zeros_like(unit_BND).scatter_add(
        1, owner_BN[..., None].expand_as(unit_BND), full.visual_BND.float()
    )
    merged_BND = torch.where(restored_B[:, None, None], sum_BND / sizes_BN[..., None], full.visual_BND.float())
    moved_BN = group_medians(full.positions_BS[:, visual], owner_BN, sizes_BN, valid_BN)
    positions_BS = full.positions_BS.clone()
    positions_BS[:, visual] = torch.where(restored_B[:, None], moved_BN, full.positions_BS[:, visual])

    place_BS = positions_BS.float()
    apart_BSS = (place_BS[:, :, None] - place_BS[:, None]).abs()
    table_X = (
        2 - (torch.arange(int(place_BS.max()) + 1, device=place_BS.device)[:, None] * rates_R).cos().mean(1)
    ).log()
    distance_BSS = table_X[apart_BSS.long()] * (restored_B[:, None, None] & ~answer_BS[..., None])
    kept_sizes_BN = sizes_BN * kept_BN
    mean_BN = (kept_sizes_BN.sum(1, keepdim=True) / kept_BN.sum(1, keepdim=True).clamp_min(1)).expand_as(sizes_BN)
    # The engine lays tokens out in the order of their places, which merging moves.
    ahead_BNN = moved_BN[:, None] > moved_BN[:, :, None]
    base_BSS = full.bias_BSS.clone()
    base_BSS[:, visual, visual] = torch.where(
        restored_B[:, None, None], ahead_BNN.float() * FORBIDDEN, base_BSS[:, visual, visual]
    )
    biases = []
    for each_BN in (mean_BN, sizes_BN):
        log_BS = torch.zeros_like(place_BS)
        log_BS[:, visual] = torch.where(restored_B[:, None], each_BN.log(), 0.0)
        log_BS[:, visual] = log_BS[:, visual].masked_fill(~kept_BN, FORBIDDEN)
        biases.append((base_BSS + log_BS[:, None] + distance_BSS).clamp_min(FORBIDDEN))
    return Laid(merged_BND, positions_BS, *biases)


def choose_tokens(visual_BND: Tensor, counts_B: Tensor, generator: torch.Generator) -> Tensor:
    """(B, N) bool: that many tokens kept, drawn one by one, or together by what they show or where they are, as
    ``maskgym.training.coherent`` has them leave."""
    valid_BN = torch.ones(visual_BND.shape[:2], dtype=torch.bool, device=visual_BND.device)
    alone_B1, scores_BN = draw_orders(visual_BND.detach(), valid_BN, generator)
    drawn_BN = torch.rand(scores_BN.shape, device=scores_BN.device, generator=generator)
    scores_BN = torch.where(alone_B1, drawn_BN, scores_BN)
    return scores_BN.argsort(1, descending=True).argsort(1) < counts_B[:, None]


def draw_restored(rows: int, generator: torch.Generator, device: Any) -> Tensor:
    """(B,) bool: rows whose dropped tokens are merged."""
    return torch.rand(rows, device=device, generator=generator) < RESTORED_SHARE
