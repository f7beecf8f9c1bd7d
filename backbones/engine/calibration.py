"""Attention that counts a merged token as the many that it stands for (RESTORE, arXiv 2606.01711).

Pruning shortens the distances that attention decays with, and one token in place of many draws the weight of one.
To the logit of a query i for a key j are added

    log s_j                       s_j: tokens that j stands for (text: 1)
    log(2 - r(i, j))              r: mean over rotary frequencies of cos(position difference x frequency)

As in the authors' code, the first layer takes the mean size for all visual tokens, and tokens of the answer see the
sizes but no distance term. r comes from the model's own rotary tables, so it holds for every kind of rotary position.

Shape legend: B rows, P packed tokens, S longest row, W head width.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from maskgym.backbones.engine.ragged import Ragged


@dataclass(frozen=True)
class Calibration:
    """What each packed token stands for.

    Attributes:
        sizes_P: tokens, at least 1.
        first_P: the same for the first layer.
        restored_B: rows that are calibrated; the others get no bias.
        prompts_B: tokens of each row before its answer; None: there is no answer.
    """

    sizes_P: Tensor
    first_P: Tensor
    restored_B: Tensor
    prompts_B: Tensor | None = None

    def only(self, keep_P: Tensor) -> Calibration:
        return replace(self, sizes_P=self.sizes_P[keep_P], first_P=self.first_P[keep_P])

    def biases(self, cos_PW: Tensor, sin_PW: Tensor, ragged: Ragged) -> tuple[Bias, Bias]:
        """The bias of the first layer, and of all others."""
        cos_BSW, sin_BSW = ragged.pad(cos_PW.float()), ragged.pad(sin_PW.float())
        alike_BSS = cos_BSW @ cos_BSW.transpose(1, 2) + sin_BSW @ sin_BSW.transpose(1, 2)
        whole_B = alike_BSS[:, 0, 0]  # a position compared with itself; not W where a model scales its rotations
        distance_BSS = (2 - alike_BSS / whole_B[:, None, None]).clamp_min(1e-6).log()
        distance_BSS = distance_BSS * self.restored_B[:, None, None]
        places_S = torch.arange(ragged.longest, device=cos_PW.device)
        seen_BSS = (places_S[:, None] >= places_S) & ragged.valid[:, None]
        biases = []
        for sizes_P in (self.first_P, self.sizes_P):
            log_BS = ragged.pad(sizes_P[:, None])[..., 0].clamp_min(1).log() * self.restored_B[:, None]
            log_BSS = log_BS[:, None] + distance_BSS
            if self.prompts_B is not None:
                is_answer_BS = places_S >= self.prompts_B.to(places_S.device)[:, None]
                log_BSS = log_BS[:, None].where(is_answer_BS[..., None], log_BSS)
            mask_BSS = log_BSS.masked_fill(~seen_BSS, -torch.inf)
            biases.append(Bias(mask_BSS[:, None].to(cos_PW.dtype), log_BS.to(cos_PW.dtype)))
        return biases[0], biases[1]


@dataclass(frozen=True)
class Bias:
    """An additive attention mask.

    Attributes:
        mask_B1SS: (B, 1, S, S) minus infinity where the causal rule or padding forbids to look.
        log_sizes_BS: what tokens of the answer add for each key.
    """

    mask_B1SS: Tensor
    log_sizes_BS: Tensor

    def select(self, rows: Tensor, longest: int) -> Bias:
        """Of some rows, the longest of which has ``longest`` tokens."""
        rows = rows.to(self.mask_B1SS.device)
        return Bias(self.mask_B1SS[rows, :, :longest, :longest], self.log_sizes_BS[rows, :longest])
