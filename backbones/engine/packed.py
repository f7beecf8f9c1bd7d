"""The kept tokens of a batch in sequence order, row after row, without padding.

Shape legend: B rows, N visual tokens, T text tokens, S = N + T tokens of a row, P packed tokens, D hidden width,
R rotary position components.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from maskgym.backbones.encodings.encoding import Encoding
from maskgym.backbones.engine.calibration import Calibration
from maskgym.backbones.engine.ragged import Ragged
from maskgym.backbones.plans.masks import Masks


@dataclass(frozen=True)
class Packed:
    """Packed tokens.

    Attributes:
        x_PD: embeddings, or hidden states.
        ragged: the rows' lengths.
        rope_PR: rotary positions.
        ids_P: int64, row x S + number; a row's visual tokens have the numbers 0 to N - 1, its text N to S - 1.
        visual: N.
        text: T.
        calibration: what attention must make up for, if anything.
    """

    x_PD: Tensor
    ragged: Ragged
    rope_PR: Tensor
    ids_P: Tensor
    visual: int
    text: int
    calibration: Calibration | None = None

    @property
    def rows_P(self) -> Tensor:
        """(P,) row of each token."""
        return self.ids_P // (self.visual + self.text)

    @property
    def numbers_P(self) -> Tensor:
        """(P,) number of each token in its row."""
        return self.ids_P % (self.visual + self.text)

    def present(self) -> Tensor:
        """(B, N) bool: visual tokens that are there."""
        all_BS = torch.zeros(self.ragged.rows * (self.visual + self.text), dtype=torch.bool, device=self.x_PD.device)
        all_BS[self.ids_P] = True
        return all_BS.unflatten(0, (self.ragged.rows, -1))[:, : self.visual]

    def only(self, visual_BN: Tensor) -> Packed:
        """All text, and of the visual tokens only these."""
        numbers_P, rows_P = self.numbers_P, self.rows_P
        keep_P = (numbers_P >= self.visual) | visual_BN[rows_P, numbers_P.clamp_max(self.visual - 1)]
        lengths = torch.bincount(rows_P[keep_P], minlength=self.ragged.rows).cpu()
        return replace(
            self,
            x_PD=self.x_PD[keep_P],
            ragged=Ragged(lengths, self.x_PD.device),
            rope_PR=self.rope_PR[keep_P],
            ids_P=self.ids_P[keep_P],
            calibration=None if self.calibration is None else self.calibration.only(keep_P),
        )


def pack(encoding: Encoding, masks: Masks, sizes_BN: Tensor | None = None, restored_B: Tensor | None = None) -> Packed:
    """Gather the kept visual tokens and the text of every row.

    Args:
        encoding: B queries.
        masks: B plans.
        sizes_BN: tokens that each visual token stands for, and
        restored_B: rows whose attention makes up for it.
    """
    x_BSD = torch.cat([encoding.visual_BND, encoding.text_BTD], dim=1)
    keep_BS = torch.cat([masks.tokens, encoding.text_valid_BT], dim=1)
    places_BS = torch.cat([encoding.visual_places_BN, encoding.text_places_BT], dim=1)
    rope_BSR = torch.cat([encoding.visual_rope_BNR, encoding.text_rope_BTR], dim=1)
    order_BS = places_BS.masked_fill(~keep_BS, torch.iinfo(torch.long).max).argsort(dim=1)
    ragged = Ragged(keep_BS.sum(1).cpu(), x_BSD.device)
    base_B = torch.arange(len(x_BSD), device=x_BSD.device) * x_BSD.shape[1]
    ids_P = (order_BS + base_B[:, None])[ragged.valid_within(x_BSD.shape[1])]
    calibration = None
    if sizes_BN is not None and restored_B is not None and bool(restored_B.any()):
        ones_BT = sizes_BN.new_ones(encoding.text_valid_BT.shape)
        uniform_BN = (sizes_BN * masks.tokens).sum(1, keepdim=True) / masks.tokens.sum(1, keepdim=True).clamp_min(1)
        sizes_BS = torch.cat([sizes_BN, ones_BT], dim=1)
        first_BS = torch.cat([uniform_BN.expand_as(sizes_BN), ones_BT], dim=1)
        calibration = Calibration(sizes_BS.flatten()[ids_P], first_BS.flatten()[ids_P], restored_B)
    text = encoding.text_valid_BT.shape[1]
    x_PD, rope_PR = x_BSD.flatten(0, 1)[ids_P], rope_BSR.flatten(0, 1)[ids_P]
    return Packed(x_PD, ragged, rope_PR, ids_P, masks.tokens.shape[1], text, calibration)
