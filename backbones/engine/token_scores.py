"""What a scorer sees of a prefill on entering a stage's layer, and attention towards visual tokens without a matrix.

Shape legend: B rows, N visual tokens, T text tokens, P packed tokens, Q packed tokens that ask, D hidden width, H query
heads, W head width, b rows of a block, r asking tokens of a row, S longest row.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from maskgym.backbones.engine.attention import to_heads
from maskgym.backbones.engine.packed import Packed
from maskgym.backbones.engine.ragged import Ragged
from maskgym.backbones.plans.stages import Asking
from maskgym.common.errors import InputError

CHUNK = 128
"""Asking tokens at a time, so that no n x n matrix is ever there."""


@dataclass(frozen=True)
class Heard:
    """Queries and keys of some rows and heads of a layer.

    Attributes:
        layer: its number.
        ragged: the rows' lengths.
        ids_P: the tokens, as in ``Packed``.
        asking_P: bool, the tokens that ask.
        q_QHW: their queries.
        k_PHW: the keys of all, one head for each query head.
        scale: of the logits.
    """

    layer: int
    ragged: Ragged
    ids_P: Tensor
    asking_P: Tensor
    q_QHW: Tensor
    k_PHW: Tensor
    scale: float

    def received(self) -> Tensor:
        """(P,) float32: attention that each token gets from those asking in its row, summed over them and the heads."""
        asked = torch.bincount(self._block_rows()[self.asking_P], minlength=self.ragged.rows)
        asking = Ragged(asked.cpu(), self.ids_P.device)
        q_bHrW, k_bHSW = to_heads(self.q_QHW, asking), to_heads(self.k_PHW, self.ragged)
        places_P = torch.arange(self.ragged.packed, device=self.ids_P.device) - self.ragged.starts.to(
            self.ids_P.device
        ).repeat_interleave(self.ragged.lengths.to(self.ids_P.device))
        places_br = asking.pad(places_P[self.asking_P][:, None])[..., 0]
        keys_S = torch.arange(self.ragged.longest, device=self.ids_P.device)
        total_bS = torch.zeros(self.ragged.rows, self.ragged.longest, device=self.ids_P.device)
        for start in range(0, asking.longest, CHUNK):
            some = slice(start, start + CHUNK)
            seen_brS = keys_S <= places_br[:, some, None]
            logits = (q_bHrW[:, :, some] @ k_bHSW.transpose(2, 3)) * self.scale
            weights = logits.float().masked_fill(~seen_brS[:, None], -torch.inf).softmax(-1)
            total_bS += (weights * asking.valid[:, None, some, None]).sum((1, 2))
        return self.ragged.unpad(total_bS[..., None])[:, 0]

    def _block_rows(self) -> Tensor:
        rows = torch.arange(self.ragged.rows, device=self.ids_P.device)
        return rows.repeat_interleave(self.ragged.lengths.to(self.ids_P.device))


@dataclass(frozen=True)
class View:
    """A prefill on entering a stage's layer.

    Attributes:
        tokens: those still there, with their hidden states.
        marked_BT: text tokens that the stage marks.
        affected_B: rows that have more visual tokens than may go on.
        before: queries and keys of layers that were run; ``asking_P`` is all there.
        layer_B: for each row the last layer before the stage in which it attended, and
        attended_B: whether there is one.
        project: queries of some asking tokens, and keys of all, of the next layer that each row will run.
    """

    tokens: Packed
    marked_BT: Tensor | None
    affected_B: Tensor
    before: list[Heard]
    layer_B: Tensor
    attended_B: Tensor
    project: Callable[[Packed, Tensor], list[Heard]]

    def attention(self, who: Asking = "last", here: bool = False) -> Tensor:
        """(B, N) float32: attention that visual tokens receive, averaged over heads and over the tokens that ask.

        Args:
            who: asks.
            here: of the layer ahead, its queries and keys computed on the side, in place of the last that was run.

        Raises:
            InputError: a row that has attended in no layer yet.
        """
        if here:
            return self._sum(self.project(self.tokens, self._asks(self.tokens.ids_P, who)))
        lost_B = self.affected_B & ~self.attended_B
        if bool(lost_B.any()):
            raise InputError(
                f"the plan at row {int(lost_B.nonzero()[0])} attends in no layer before tokens are to be chosen by "
                "attention; keep a layer before that"
            )
        parts = []
        for heard in self.before:
            asking_P = self._asks(heard.ids_P, who)
            parts.append(
                Heard(heard.layer, heard.ragged, heard.ids_P, asking_P, heard.q_QHW[asking_P], heard.k_PHW, heard.scale)
            )
        return self._sum(parts, self.layer_B)

    def _sum(self, parts: list[Heard], layer_B: Tensor | None = None) -> Tensor:
        """The parts' attention by visual token; of each row only from its own layer."""
        rows, width = self.tokens.ragged.rows, self.tokens.visual + self.tokens.text
        total = torch.zeros(rows * width, device=self.tokens.x_PD.device)
        terms_B = torch.zeros(rows, device=total.device)
        for heard in parts:
            rows_P = heard.ids_P // width
            mine_P = torch.ones_like(rows_P) if layer_B is None else (layer_B[rows_P] == heard.layer).long()
            total.index_add_(0, heard.ids_P, heard.received() * mine_P)
            terms_B.index_add_(0, rows_P, (heard.asking_P * mine_P * heard.k_PHW.shape[1]).float())
        return total.unflatten(0, (rows, width))[:, : self.tokens.visual] / terms_B.clamp_min(1)[:, None]

    def _asks(self, ids_P: Tensor, who: Asking) -> Tensor:
        """(P,) bool which of some tokens ask."""
        visual, text = self.tokens.visual, self.tokens.text
        width = visual + text
        if who == "all":
            return torch.ones_like(ids_P, dtype=torch.bool)
        if who == "marked":
            assert self.marked_BT is not None
            marked_BS = torch.zeros(self.tokens.ragged.rows, width, dtype=torch.bool, device=ids_P.device)
            own_BT = self.marked_BT[:, :text]
            marked_BS[:, visual : visual + own_BT.shape[1]] = own_BT
            return marked_BS.flatten()[ids_P]
        last_B = self.tokens.ids_P[self.tokens.ragged.last]
        return torch.isin(ids_P, last_B)
