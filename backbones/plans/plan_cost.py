"""What plans cost beyond the decoder's layers: choosing tokens inside it, and laying out what is kept before it.

Counted as ``maskgym.backbones.plans.cost`` counts. What a batch adds where only some of its rows need it is not in it.

Shape legend: B rows, L layers, H head slots per layer, G key-value groups per layer.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from maskgym.backbones.plans.cost import DecoderShape
from maskgym.backbones.plans.masks import Masks
from maskgym.backbones.plans.stages import Asking, Stage, token_counts
from maskgym.backbones.plans.survivors import RESTORED, Survivors


@dataclass(frozen=True)
class StagePrice:
    """What the cost of scoring at a stage depends on.

    Attributes:
        shape: of the decoder.
        masks: B plans.
        stage: the stage.
        lengths_BL: tokens of the sequence in each layer.
        entering_B: tokens of the sequence that reach the stage.
    """

    shape: DecoderShape
    masks: Masks
    stage: Stage
    lengths_BL: Tensor
    entering_B: Tensor

    def attention(self, who: Asking, here: bool) -> Tensor:
        """(B,) FLOPs of ``View.attention`` with the same arguments."""
        attends_BL = self.masks.effective_heads.any(2)
        if not here:
            layer_B, there_B = last_before(attends_BL, self.stage.layer)
            n_B = self.lengths_BL.gather(1, layer_B[:, None])[:, 0]
        else:
            layer_B, there_B = first_from(attends_BL, self.stage.layer)
            n_B = self.entering_B
        query_B, key_B = self._widths(layer_B)
        asks_B = self._asks(who, n_B)
        flops_B = 2 * asks_B * n_B * query_B
        if here:
            flops_B = flops_B + 2 * self.shape.hidden * (n_B * key_B + asks_B * query_B)
        return flops_B * there_B

    def _asks(self, who: Asking, n_B: Tensor) -> Tensor:
        if who == "all":
            return n_B
        if who == "marked" and self.stage.marked is not None:
            return self.stage.marked.sum(1)
        return torch.ones_like(n_B)

    def _widths(self, layer_B: Tensor) -> tuple[Tensor, Tensor]:
        """(B,) columns of the queries and of the keys that each row's plan computes in a layer."""
        heads_BLH = self.masks.effective_heads
        heads_BH = heads_BLH[torch.arange(len(heads_BLH), device=heads_BLH.device), layer_B]
        groups_BG = heads_BH.unflatten(1, (-1, self.shape.slots_per_group)).any(2)
        query, key = (
            torch.tensor(widths, device=heads_BH.device) for widths in (self.shape.query_width, self.shape.key_width)
        )
        return (heads_BH * query).sum(1), (groups_BG * key).sum(1)


def last_before(attends_BL: Tensor, layer: int) -> tuple[Tensor, Tensor]:
    """(B,) the last layer before ``layer`` in which each row attends, and whether there is one."""
    numbers_L = torch.arange(attends_BL.shape[1], device=attends_BL.device)
    last_B = (attends_BL & (numbers_L < layer)).long().mul(numbers_L + 1).amax(1) - 1
    return last_B.clamp_min(0), last_B >= 0


def first_from(attends_BL: Tensor, layer: int) -> tuple[Tensor, Tensor]:
    """(B,) the first layer from ``layer`` on in which each row attends, and whether there is one."""
    numbers_L = torch.arange(attends_BL.shape[1], device=attends_BL.device)
    ahead_BL = attends_BL & (numbers_L >= layer)
    return ahead_BL.long().argmax(1), ahead_BL.any(1)


def making_flops(shape: DecoderShape, masks: Masks, available_B: Tensor, text_B: Tensor) -> Tensor:
    """(B,) int64 FLOPs of making and laying out B plans.

    Args:
        shape: of the decoder.
        masks: B plans, without tokens that an image does not have.
        available_B: visual tokens that each image has.
        text_B: text tokens of each prompt.
    """
    kept_B = masks.tokens.sum(1)
    layers = masks.layers.shape[1]
    lengths_BL = token_counts(kept_B, masks.stages, layers) + text_B[:, None]
    restored_B = torch.zeros_like(kept_B, dtype=torch.bool)
    total_B = torch.zeros_like(kept_B) if masks.making is None else masks.making
    if masks.survivors is not None:
        restored_B = is_restored(masks.survivors, kept_B, available_B)
        targets = masks.survivors.targets
        targets_B = kept_B if targets is None else (targets & masks.tokens).sum(1)
        total_B = total_B + laying_out_flops(shape, masks.survivors, kept_B, targets_B, available_B, text_B)
    before_B = kept_B
    for stage in masks.stages:
        works_B = stage.keep < before_B
        if stage.scorer is not None:
            price = StagePrice(shape, masks, stage, lengths_BL, before_B + text_B)
            total_B = total_B + stage.scorer.flops(price) * works_B
        before_B = before_B.minimum(stage.keep)
        total_B = total_B + calibration_flops(shape, before_B + text_B) * (works_B & restored_B)
    return total_B


def laying_out_flops(
    shape: DecoderShape, survivors: Survivors, kept_B: Tensor, targets_B: Tensor, available_B: Tensor, text_B: Tensor
) -> Tensor:
    """(B,) FLOPs of laying out so many kept tokens, of which others may be merged into ``targets_B``; counts, or sums
    of gates."""
    merging_B = merging_flops(shape, survivors, kept_B, targets_B, available_B)
    return merging_B + calibration_flops(shape, kept_B + text_B) * is_restored(survivors, kept_B, available_B)


def most_laying_out_flops(shape: DecoderShape, survivors: Survivors, available_B: Tensor, text_B: Tensor) -> Tensor:
    """(B,) no less than ``laying_out_flops``, whatever is kept: half the tokens compared with the other half, and the
    calibration of the whole sequence."""
    merging_B = (available_B * available_B * shape.hidden // 2 + 1) * survivors.merged
    return merging_B + calibration_flops(shape, available_B + text_B) * (survivors.positions == RESTORED)


def merging_flops(
    shape: DecoderShape, survivors: Survivors, kept_B: Tensor, targets_B: Tensor, available_B: Tensor
) -> Tensor:
    """(B,) the similarity of every dropped token with every one that it may be merged into; arguments as above."""
    merges_B = survivors.merged & _is_moved(kept_B, available_B)
    return 2 * (available_B - kept_B) * targets_B * shape.hidden * merges_B


def is_restored(survivors: Survivors, kept_B: Tensor, available_B: Tensor) -> Tensor:
    """(B,) bool: rows whose attention is calibrated."""
    return (survivors.positions == RESTORED) & _is_moved(kept_B, available_B)


def _is_moved(kept_B: Tensor, available_B: Tensor) -> Tensor:
    """(B,) bool: rows that drop something, and keep something to lay out."""
    return (kept_B < available_B) & (kept_B > 0)


def calibration_flops(shape: DecoderShape, n_B: Tensor) -> Tensor:
    """(B,) how alike the rotations of every pair of n positions are, from their cosines and sines."""
    return 4 * n_B * n_B * shape.head_width
