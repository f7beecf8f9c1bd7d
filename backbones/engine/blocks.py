"""How the rows of a batch with different head plans are covered by blocks that run together.

Shape legend: B rows, L layers, H head slots.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from maskgym.backbones.plans.masks import Masks


@dataclass(frozen=True)
class Block:
    """Rows that are computed together with the same head slots.

    Attributes:
        rows: (b,) row numbers among the layer's rows, on the CPU; None = all of them.
        slots: the head slots computed.
    """

    rows: Tensor | None
    slots: tuple[int, ...]


@dataclass(frozen=True)
class LayerPlan:
    """How one layer runs for a batch.

    Attributes:
        rows: (b,) rows of the batch that enter the layer, on the CPU; None = all of them.
        attention: blocks of the attention part.
        mlp: blocks of the MLP part.
    """

    rows: Tensor | None
    attention: list[Block]
    mlp: list[Block]

    def rows_of(self, block: Block, rows: int) -> Tensor:
        """(b,) rows of the batch, which has so many, that a block computes, on the CPU."""
        entering = torch.arange(rows) if self.rows is None else self.rows
        return entering if block.rows is None else entering[block.rows]


def plan_layers(masks: Masks, slots_per_group: int, mlp_follows_heads: bool) -> list[LayerPlan]:
    """How every layer runs under B plans.

    Args:
        masks: B plans.
        slots_per_group: consecutive slots that share a key-value group.
        mlp_follows_heads: whether the MLP is cut as the heads are.
    """
    heads_BLH, layers_BL = masks.heads.cpu(), masks.layers.cpu()
    every_slot = tuple(range(heads_BLH.shape[2]))
    plans = []
    for number in range(layers_BL.shape[1]):
        heads_BH = heads_BLH[:, number] & layers_BL[:, number, None]
        runs_B = heads_BH.any(1) if mlp_follows_heads else layers_BL[:, number]
        rows = None if bool(runs_B.all()) else runs_B.nonzero()[:, 0]
        if rows is not None:
            heads_BH = heads_BH[rows]
        attention = cut_blocks(heads_BH, slots_per_group)
        if not mlp_follows_heads:
            mlp = [Block(None, every_slot)] if len(heads_BH) else []
        else:
            mlp = attention if slots_per_group == 1 else cut_blocks(heads_BH)
        plans.append(LayerPlan(rows, attention, mlp))
    return plans


def cut_blocks(heads_BH: Tensor, slots_per_group: int = 1) -> list[Block]:
    """Cover every kept (row, slot) pair exactly once, by whichever cut has fewer blocks.

    No two blocks of a row share a key-value group, so that none is computed twice.

    Args:
        heads_BH: (B, H) kept slots of each row, on the CPU.
        slots_per_group: consecutive slots that share a key-value group.
    """
    whole = _blocks_by_pattern(heads_BH, 0)
    if len(whole) <= 1:
        return whole
    slots = heads_BH.shape[1]
    starts = range(0, slots, slots_per_group)
    by_group = [
        block for start in starts for block in _blocks_by_pattern(heads_BH[:, start : start + slots_per_group], start)
    ]
    return whole if len(whole) <= len(by_group) else by_group


def _blocks_by_pattern(heads_BH: Tensor, first_slot: int) -> list[Block]:
    """One block for every distinct pattern of some slots, of which ``first_slot`` is the first."""
    patterns, pattern_of_row = heads_BH.unique(dim=0, return_inverse=True)
    blocks = []
    for number, pattern in enumerate(patterns):
        slots = tuple((pattern.nonzero()[:, 0] + first_slot).tolist())
        if slots:
            rows = None if len(patterns) == 1 else (pattern_of_row == number).nonzero()[:, 0]
            blocks.append(Block(rows, slots))
    return blocks
