"""Deciding inside the decoder: from some layer on, layers and heads are chosen by what an extra token has read.

How much will be kept is part of the plan, so its cost is known before it runs; which parts they are depends on what the
layers before have made of image and question (AdaLLaVA: Xu et al., ICCV 2025).

Shape legend: B rows, D hidden width, L layers, H head slots.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from maskgym.backbones.encodings.encoding import Encoding
from maskgym.common.errors import InputError


class Chooser(Protocol):
    """Chooses what the layers from a decision on keep."""

    def token(self, units_B: Tensor) -> Tensor:
        """(B, D) an extra embedding for the end of each prompt, whose state the decision reads."""
        ...

    def choose(self, state_BD: Tensor, units_B: Tensor) -> tuple[Tensor, Tensor]:
        """Bool (B, L, H) head slots and (B, L) layers, so many units of them; what is before the decision is not
        looked at."""
        ...


@dataclass(frozen=True, eq=False)
class Midway:
    """A decision on entering a layer.

    Attributes:
        layer: the first that is decided on; all before it are in the plan.
        units_B: int64, how much may be kept from there on.
        chooser: makes the extra token when the plan runs, and decides; until then nothing is computed.
    """

    layer: int
    units_B: Tensor
    chooser: Chooser

    def map(self, function: Callable[[Tensor], Tensor]) -> Midway:
        """The decision with a function applied to each tensor."""
        return replace(self, units_B=function(self.units_B))

    @staticmethod
    def cat(parts: Sequence[Midway | None]) -> Midway | None:
        """The decision of a batch put together from parts.

        Raises:
            InputError: parts that are not decided in the same way.
        """
        first = parts[0]
        kinds = {None if part is None else (part.layer, id(part.chooser)) for part in parts}
        if len(kinds) > 1:
            raise InputError("plans that are decided inside the decoder share a batch only with plans of their kind")
        if first is None:
            return None
        return replace(first, units_B=torch.cat([part.units_B for part in parts if part is not None]))

    def decide(self, state_BD: Tensor, heads_BLH: Tensor, layers_BL: Tensor) -> tuple[Tensor, Tensor]:
        """Heads and layers of the plans, from ``layer`` on as chosen.

        Args:
            state_BD: of the extra token.
            heads_BLH: bool, head slots so far.
            layers_BL: bool, layers so far.
        """
        chosen = self.chooser.choose(state_BD, self.units_B)
        heads_BLH, layers_BL = (
            torch.cat([before[:, : self.layer], after[:, self.layer :]], dim=1)
            for before, after in zip((heads_BLH, layers_BL), chosen, strict=True)
        )
        return heads_BLH, layers_BL

    def append_to(self, encoding: Encoding) -> Encoding:
        """The encoding with the extra token after each prompt."""
        with torch.no_grad():
            token_BD = self.chooser.token(self.units_B)
        rows_B = torch.arange(len(encoding), device=token_BD.device)
        column_B = encoding.text_tokens
        last_B = encoding.text_places_BT.masked_fill(~encoding.text_valid_BT, -1).amax(1)
        next_BR = encoding.next_rope_B[:, None].expand(-1, encoding.text_rope_BTR.shape[2])

        def grow(column: Tensor, value: Tensor) -> Tensor:
            wider = torch.cat([column, torch.zeros_like(column[:, :1])], dim=1)
            return wider.index_put((rows_B, column_B), value.to(column.dtype))

        return replace(
            encoding,
            text_BTD=grow(encoding.text_BTD, token_BD),
            text_valid_BT=grow(encoding.text_valid_BT, torch.ones_like(column_B)),
            text_places_BT=grow(encoding.text_places_BT, last_B + 1),
            text_rope_BTR=grow(encoding.text_rope_BTR, next_BR),
            next_rope_B=encoding.next_rope_B + 1,
        )
