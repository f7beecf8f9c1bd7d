"""Keys and values of prefilled rows, per layer and block, growing as answers are decoded.

Shape legend: b rows of a block, S cached places, t new tokens.
"""

from __future__ import annotations

from copy import copy
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from maskgym.backbones.engine.blocks import LayerPlan
from maskgym.backbones.engine.ragged import Ragged


class CachedBlock:
    """Keys and values that one block's rows and heads wrote, with room to grow.

    Args:
        keys: (b, KV heads, S, head width), rows padded at the end.
        values: likewise.
        ragged: the rows' lengths at the prefill.
        log_sizes: (b, S) added to the logits of the keys, if anything is.
    """

    ROOM = 32

    def __init__(self, keys: Tensor, values: Tensor, ragged: Ragged, log_sizes: Tensor | None = None):
        self.keys, self.values, self.log_sizes = keys, values, log_sizes
        self.used = keys.shape[2]
        self.padding_free = ragged.uniform
        self.valid = ragged.valid

    def fork(self) -> CachedBlock:
        """A cache that continues from here without changing this one."""
        fork = copy(self)
        # Without room of its own the fork must copy before it writes.
        fork.keys, fork.values = (x[:, :, : self.used] for x in (self.keys, self.values))
        fork.valid = self.valid[:, : self.used]
        fork.log_sizes = None if self.log_sizes is None else self.log_sizes[:, : self.used]
        return fork

    def append(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Add t tokens a row; returns all keys and values so far, and the attention mask (b, 1, t, S) if needed."""
        rows, t = keys.shape[0], keys.shape[2]
        end = self.used + t
        if end > self.keys.shape[2]:
            self.keys, self.values = (F.pad(x, (0, 0, 0, t + self.ROOM)) for x in (self.keys, self.values))
            self.valid = F.pad(self.valid, (0, t + self.ROOM))
            self.log_sizes = None if self.log_sizes is None else F.pad(self.log_sizes, (0, t + self.ROOM))
        self.keys[:, :, self.used : end] = keys
        self.values[:, :, self.used : end] = values
        self.valid[:, self.used : end] = True
        mask = None
        if t > 1 or not self.padding_free or self.log_sizes is not None:
            old = self.valid[:, None, None, : self.used].expand(rows, 1, t, -1)
            causal = torch.ones(t, t, dtype=torch.bool, device=keys.device).tril().expand(rows, 1, t, t)
            mask = torch.cat([old, causal], dim=3)
        if mask is not None and self.log_sizes is not None:
            mask = self.log_sizes[:, None, None, :end].masked_fill(~mask, -torch.inf)
        self.used = end
        return self.keys[:, :, :end], self.values[:, :, :end], mask


@dataclass
class KVCache:
    """Keys and values of a prefilled batch.

    Attributes:
        plans: the layer plans of the prefill, re-used by every later step.
        blocks: [layer][attention block].
        moved_B: how far renumbering has moved the rotary position of the first answer token towards the start; an extra
            token moves it away.
    """

    plans: list[LayerPlan]
    blocks: list[list[CachedBlock]]
    moved_B: Tensor | None = None

    def fork(self) -> KVCache:
        """A cache that continues from here without changing this one."""
        return KVCache(self.plans, [[block.fork() for block in layer] for layer in self.blocks], self.moved_B)
