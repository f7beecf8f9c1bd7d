"""Rows of different lengths, packed end to end, and the index arithmetic between packed and padded.

Shape legend: B rows, P packed tokens (the sum of the lengths), S the longest row, W any width.
"""

from __future__ import annotations

from functools import cached_property

import torch
from torch import Tensor


class Ragged:
    """The lengths of B rows packed into P tokens.

    Args:
        lengths: (B,) int64 on the CPU, each at least 1.
        device: where the index tensors, and what they index, live.
    """

    def __init__(self, lengths: Tensor, device: torch.device | str = "cpu"):
        self.lengths = lengths
        self.device = device
        self.rows = len(lengths)
        self.longest = int(lengths.max())
        self.packed = int(lengths.sum())
        self.uniform = self.packed == self.rows * self.longest

    @cached_property
    def starts(self) -> Tensor:
        """(B,) packed index of each row's first token, on the CPU."""
        return self.lengths.cumsum(0) - self.lengths

    @cached_property
    def bounds(self) -> Tensor:
        """(B + 1,) int32 packed index at which each row begins, and the end; what FlashAttention asks for."""
        return torch.nn.functional.pad(self.lengths.cumsum(0), (1, 0)).int().to(self.device)

    @cached_property
    def last(self) -> Tensor:
        """(B,) packed index of each row's last token."""
        return (self.starts + self.lengths - 1).to(self.device)

    @cached_property
    def valid(self) -> Tensor:
        """(B, S) whether a padded place holds a token."""
        return self.valid_within(self.longest)

    def valid_within(self, width: int) -> Tensor:
        """(B, width) whether a place holds a token when rows are padded to ``width``."""
        return (torch.arange(width) < self.lengths[:, None]).to(self.device)

    @cached_property
    def _pad_index(self) -> Tensor:
        """(B, S) packed index of each padded place; places past the end repeat the row's last token."""
        within = torch.minimum(torch.arange(self.longest), self.lengths[:, None] - 1)
        return (self.starts[:, None] + within).to(self.device)

    @cached_property
    def _unpad_index(self) -> Tensor:
        """(P,) place of each packed token in the flattened (B * S) padding."""
        return self.valid.flatten().nonzero()[:, 0]

    def pad(self, x_PW: Tensor) -> Tensor:
        """(P, W) to (B, S, W)."""
        if self.uniform:
            return x_PW.unflatten(0, (self.rows, self.longest))
        return x_PW[self._pad_index]

    def unpad(self, x_BSW: Tensor) -> Tensor:
        """(B, S, W) to (P, W)."""
        flat = x_BSW.flatten(0, 1)
        return flat if self.uniform else flat[self._unpad_index]

    def select(self, rows: Tensor) -> tuple[Ragged, Tensor]:
        """The batch of some rows, and the (P',) packed index of their tokens in this batch.

        Args:
            rows: (B',) row numbers, on the CPU.
        """
        part = Ragged(self.lengths[rows], self.device)
        shift = (self.starts[rows] - part.starts).repeat_interleave(part.lengths)
        return part, (torch.arange(part.packed) + shift).to(self.device)
