"""Where the packed tokens of some rows stand: their rows, their rotations, and what attention adds for them.

Shape legend: P packed tokens, W head width, b rows, S longest row.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from maskgym.backbones.engine.calibration import Bias
from maskgym.backbones.engine.ragged import Ragged


@dataclass(frozen=True)
class Frame:
    """Where tokens stand.

    Attributes:
        ragged: the rows' lengths.
        cos_PW, sin_PW: rotary tables.
        ids_P: the tokens, as in ``Packed``, at a prefill.
        bias: an attention mask, if attention is calibrated.
    """

    ragged: Ragged
    cos_PW: Tensor
    sin_PW: Tensor
    ids_P: Tensor | None = None
    bias: Bias | None = None

    def select(self, rows: Tensor) -> tuple[Frame, Tensor]:
        """The frame of some rows, and the (P',) packed index of their tokens in this one.

        Args:
            rows: (b,) row numbers, on the CPU.
        """
        ragged, index = self.ragged.select(rows)
        ids_P = None if self.ids_P is None else self.ids_P[index]
        bias = None if self.bias is None else self.bias.select(rows, ragged.longest)
        return Frame(ragged, self.cos_PW[index], self.sin_PW[index], ids_P, bias), index

    @property
    def mask(self) -> Tensor | None:
        """(b, 1, S, S) added to the logits; None: the causal rule alone."""
        return None if self.bias is None else self.bias.mask_B1SS

    @property
    def cached(self) -> tuple[Ragged, Tensor | None]:
        """What a key-value cache must know of the rows beside keys and values."""
        return self.ragged, None if self.bias is None else self.bias.log_sizes_BS
