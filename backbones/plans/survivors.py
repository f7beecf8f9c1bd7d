"""How the visual tokens that a plan keeps before the language model are laid out;
``maskgym.backbones.engine.arrange`` does it.

Shape legend: B rows, N visual tokens, D hidden width of the decoder.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from maskgym.common.errors import InputError

POSITIONS = ("original", "renumbered", "restored")
ORIGINAL, RENUMBERED, RESTORED = range(3)


@dataclass(frozen=True, eq=False)
class Survivors:
    """The layout of each row. A row that drops no visual token is left as it is.

    Attributes:
        positions: (B,) int64 into ``POSITIONS``. Original: where the token stands in the unpruned sequence.
            Renumbered: positions that nobody holds any more are closed up. Restored (RESTORE, arXiv 2606.01711): each
            token stands at the median position of the tokens merged into it, and attention counts it as so many.
        merged: (B,) bool: dropped tokens are averaged into the kept one that they resemble most.
        own: (B,) bool: rows whose tokens the plan has rewritten itself.
        tokens: (B, N, D) those tokens, if any row has its own.
        order: (B, N) renumbered tokens stand in this order; None: in their own.
        targets: (B, N) bool: kept tokens that others may be merged into; None: all.
    """

    positions: Tensor
    merged: Tensor
    own: Tensor
    tokens: Tensor | None = None
    order: Tensor | None = None
    targets: Tensor | None = None

    @classmethod
    def plain(
        cls, rows: int, positions: str = "original", merge: bool = False, device: torch.device | str = "cpu"
    ) -> Survivors:
        """One layout for all rows; restored ones are merged.

        Raises:
            InputError: unknown positions.
        """
        if positions not in POSITIONS:
            raise InputError(f"positions are {positions!r}; they must be one of {', '.join(POSITIONS)}")
        merge = merge or positions == "restored"
        return cls(
            torch.full((rows,), POSITIONS.index(positions), device=device),
            torch.full((rows,), merge, device=device),
            torch.zeros(rows, dtype=torch.bool, device=device),
        )

    @classmethod
    def asked(cls, rows: int, positions: str, merge: bool, device: torch.device | str = "cpu") -> Survivors | None:
        """One layout for all rows, or None if that is to leave them where they were.

        Raises:
            InputError: unknown positions.
        """
        plain = cls.plain(rows, positions, merge, device)
        return plain if merge or positions != "original" else None

    def map(self, function: Callable[[Tensor], Tensor]) -> Survivors:
        """The layout with a function applied to each tensor."""
        parts = {name: part for name, part in vars(self).items() if part is not None}
        return replace(self, **{name: function(part) for name, part in parts.items()})

    @staticmethod
    def cat(parts: Sequence[Survivors | None], rows: Sequence[int]) -> Survivors | None:
        """The layout of a batch put together from parts of ``rows`` rows each; None if no part has one."""
        like = next((part for part in parts if part is not None), None)
        if like is None:
            return None
        device = like.positions.device
        full = [
            Survivors.plain(count, device=device) if part is None else part
            for part, count in zip(parts, rows, strict=True)
        ]
        always = (torch.cat([getattr(part, name) for part in full]) for name in ("positions", "merged", "own"))
        return Survivors(*always, *(_cat_optional(full, name, rows) for name in ("tokens", "order", "targets")))


def _cat_optional(parts: Sequence[Survivors], name: str, rows: Sequence[int]) -> Tensor | None:
    """A tensor that some parts have; the others' rows get what means the same as having none."""
    found = [getattr(part, name) for part in parts]
    like = next((part for part in found if part is not None), None)
    if like is None:
        return None
    nothing = {
        "tokens": torch.zeros_like(like[:1]),
        "order": torch.arange(like.shape[1], dtype=like.dtype, device=like.device)[None],
        "targets": torch.ones_like(like[:1]),
    }
    return torch.cat(
        [
            nothing[name].expand(count, *like.shape[1:]) if part is None else part
            for part, count in zip(found, rows, strict=True)
        ]
    )
