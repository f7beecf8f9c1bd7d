"""Lays out the visual tokens that plans keep: merges, moves, closes up gaps, before the language model sees them.

Shape legend: B rows, N visual tokens, T text tokens, D hidden width, R rotary position components, M dropped or target
tokens of the row with most.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from maskgym.backbones.encodings.encoding import Encoding
from maskgym.backbones.engine.picking import pick
from maskgym.backbones.plans.masks import Masks
from maskgym.backbones.plans.survivors import RENUMBERED, RESTORED, Survivors


@dataclass(frozen=True)
class Arranged:
    """What the language model is given.

    Attributes:
        encoding: with the tokens and positions that the plans leave.
        sizes_BN: tokens that each kept one stands for; None where nothing is restored.
        restored_B: rows whose attention must make up for it.
    """

    encoding: Encoding
    sizes_BN: Tensor | None = None
    restored_B: Tensor | None = None


def arrange(encoding: Encoding, masks: Masks) -> Arranged:
    """The encoding as the plans lay it out.

    Args:
        encoding: B queries.
        masks: B plans, without tokens that an image does not have.
    """
    survivors = masks.survivors
    if survivors is None:
        return Arranged(encoding)
    kept_BN = masks.tokens
    moved_B = (encoding.visual_valid_BN & ~kept_BN).any(1) & kept_BN.any(1)
    if survivors.tokens is not None:
        own_B11 = (survivors.own & moved_B)[:, None, None]
        encoding = replace(encoding, visual_BND=torch.where(own_B11, survivors.tokens, encoding.visual_BND))
    merged_B, restored_B = survivors.merged & moved_B, (survivors.positions == RESTORED) & moved_B
    sizes_BN = None
    if bool(merged_B.any()):
        owner_BN = owners(encoding, masks, survivors.targets)
        sizes_BN = group_sizes(owner_BN, encoding.visual_valid_BN)
        encoding = _average(encoding, owner_BN, sizes_BN, merged_B)
        encoding = _to_medians(encoding, owner_BN, sizes_BN, restored_B)
    renumbered_B = (survivors.positions == RENUMBERED) & moved_B
    if bool(renumbered_B.any()):
        encoding = _close_up(_in_order(encoding, kept_BN, survivors, renumbered_B), kept_BN, renumbered_B)
    return Arranged(encoding, sizes_BN, restored_B)


def owners(encoding: Encoding, masks: Masks, targets_BN: Tensor | None = None) -> Tensor:
    """(B, N) the token that each visual token goes into: a kept one into itself, a dropped one into the target that it
    resembles most by cosine."""
    kept_BN = masks.tokens
    targets_BN = kept_BN if targets_BN is None else kept_BN & targets_BN
    owner_BN = torch.arange(kept_BN.shape[1], device=kept_BN.device).expand_as(kept_BN).clone()
    unit_BND = F.normalize(encoding.visual_BND.float(), dim=-1)
    dropped_BMD, dropped_BM, is_dropped_BM = pick(unit_BND, encoding.visual_valid_BN & ~kept_BN)
    target_BMD, target_BM, is_target_BM = pick(unit_BND, targets_BN)
    if dropped_BM.shape[1] == 0 or target_BM.shape[1] == 0:
        return owner_BN
    alike_BMM = (dropped_BMD @ target_BMD.transpose(1, 2)).masked_fill(~is_target_BM[:, None], -torch.inf)
    nearest_BM = target_BM.gather(1, alike_BMM.argmax(2))
    has_target_B1 = is_target_BM.any(1, keepdim=True)
    nearest_BM = torch.where(is_dropped_BM & has_target_B1, nearest_BM, owner_BN.gather(1, dropped_BM))
    return owner_BN.scatter(1, dropped_BM, nearest_BM)


def group_sizes(owner_BN: Tensor, valid_BN: Tensor) -> Tensor:
    """(B, N) float: visual tokens that go into each, itself included; at least 1."""
    return (
        valid_BN.new_zeros(owner_BN.shape, dtype=torch.float32).scatter_add_(1, owner_BN, valid_BN.float()).clamp_min(1)
    )


def _average(encoding: Encoding, owner_BN: Tensor, sizes_BN: Tensor, merged_B: Tensor) -> Encoding:
    """Each target replaced by the mean of its group."""
    x_BND = encoding.visual_BND
    index_BND = owner_BN[..., None].expand_as(x_BND)
    weighed_BND = x_BND.float() * encoding.visual_valid_BN[..., None]
    mean_BND = torch.zeros_like(weighed_BND).scatter_add_(1, index_BND, weighed_BND) / sizes_BN[..., None]
    return replace(encoding, visual_BND=torch.where(merged_B[:, None, None], mean_BND.to(x_BND.dtype), x_BND))


def _to_medians(encoding: Encoding, owner_BN: Tensor, sizes_BN: Tensor, restored_B: Tensor) -> Encoding:
    """Each kept token moved to the (lower) median place, and rotary position, of its group."""
    valid_BN = encoding.visual_valid_BN
    places_BN = group_medians(encoding.visual_places_BN, owner_BN, sizes_BN, valid_BN)
    rope_BNR = torch.stack(
        [group_medians(part, owner_BN, sizes_BN, valid_BN) for part in encoding.visual_rope_BNR.unbind(2)], dim=2
    )
    return replace(
        encoding,
        visual_places_BN=torch.where(restored_B[:, None], places_BN, encoding.visual_places_BN),
        visual_rope_BNR=torch.where(restored_B[:, None, None], rope_BNR, encoding.visual_rope_BNR),
    )


def group_medians(values_BN: Tensor, owner_BN: Tensor, sizes_BN: Tensor, valid_BN: Tensor) -> Tensor:
    """(B, N) at each owner the lower median of the values (int64, at least 0) in its group; elsewhere anything."""
    span = int(values_BN.max()) + 1
    keys_BN = (owner_BN * span + values_BN).masked_fill(~valid_BN, torch.iinfo(torch.int64).max)
    sorted_BN = keys_BN.sort(dim=1).values
    counts_BN = torch.zeros_like(owner_BN).scatter_add_(1, owner_BN, valid_BN.long())
    middle_BN = counts_BN.cumsum(1) - counts_BN + (counts_BN.clamp_min(1) - 1) // 2
    return sorted_BN.gather(1, middle_BN.clamp_max(owner_BN.shape[1] - 1)) % span


def _in_order(encoding: Encoding, kept_BN: Tensor, survivors: Survivors, renumbered_B: Tensor) -> Encoding:
    """The kept tokens in the plan's order, each at the place of the one that stood there."""
    if survivors.order is None:
        return encoding
    last = torch.iinfo(torch.int64).max
    from_BN = encoding.visual_places_BN.masked_fill(~kept_BN, last).argsort(dim=1, stable=True)
    to_BN = survivors.order.double().masked_fill(~kept_BN, torch.inf).argsort(dim=1, stable=True)
    to_BN = torch.where(renumbered_B[:, None], to_BN, from_BN)
    places_BN, rope_BNR = encoding.visual_places_BN, encoding.visual_rope_BNR
    wide_from, wide_to = (index[..., None].expand_as(rope_BNR) for index in (from_BN, to_BN))
    return replace(
        encoding,
        visual_places_BN=places_BN.scatter(1, to_BN, places_BN.gather(1, from_BN)),
        visual_rope_BNR=rope_BNR.scatter(1, wide_to, rope_BNR.gather(1, wide_from)),
    )


def _close_up(encoding: Encoding, kept_BN: Tensor, renumbered_B: Tensor) -> Encoding:
    """Rotary positions renumbered 0, 1, 2, … over those that some kept token holds in some component: the place in the
    pruned sequence where positions have one component; rows and columns that are left where they have three."""
    visual_BNR, text_BTR = encoding.visual_rope_BNR, encoding.text_rope_BTR
    held_BX = torch.cat([visual_BNR.flatten(1), text_BTR.flatten(1)], dim=1)
    is_held_BX = torch.cat(
        [
            kept_BN[..., None].expand_as(visual_BNR).flatten(1),
            encoding.text_valid_BT[..., None].expand_as(text_BTR).flatten(1),
        ],
        dim=1,
    )
    used_BM = torch.zeros(len(held_BX), int(encoding.next_rope_B.max()) + 1, dtype=torch.long, device=held_BX.device)
    used_BM = used_BM.scatter_add_(1, held_BX, is_held_BX.long()) > 0
    number_BM = used_BM.long().cumsum(1) - 1
    closed_BX = number_BM.gather(1, held_BX).clamp_min(0)
    closed_BX = torch.where(renumbered_B[:, None], closed_BX, held_BX)
    visual, text = closed_BX.split([visual_BNR[0].numel(), text_BTR[0].numel()], dim=1)
    return replace(
        encoding,
        visual_rope_BNR=visual.reshape(visual_BNR.shape),
        text_rope_BTR=text.reshape(text_BTR.shape),
        next_rope_B=torch.where(renumbered_B, used_BM.sum(1), encoding.next_rope_B),
    )
