"""Rules that keep tokens unlike each other: DivPrune, CDPruner.

Shape legend: B rows, N visual tokens, T text tokens, D hidden width.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from maskgym.backbones.backbone import Backbone
from maskgym.backbones.encodings.encoding import Encoding
from maskgym.policies.static.counts import TokenPlanner

DECIMALS, LEAST_GAIN = 5, 1e-4


class GreedyPlanner(TokenPlanner):
    """Rules that choose one token after another."""

    positions = "renumbered"

    @abstractmethod
    def ranks(self, encoding: Encoding, most: int) -> Tensor:
        """(B, N) int64: when each token is chosen, from 0; those not among the first ``most`` come after all."""

    def choose(self, encoding: Encoding, counts_B: Tensor) -> Tensor:
        valid_BN = encoding.visual_valid_BN
        some_B = counts_B < valid_BN.sum(1)
        ranks_BN = self.ranks(encoding, int(counts_B[some_B].max()))
        return valid_BN & ((ranks_BN < counts_B[:, None]) | ~some_B[:, None])


class DivPrunePlanner(GreedyPlanner):
    """DivPrune (Alvar et al., arXiv 2503.02175, CVPR 2025): the subset whose closest two members are far apart.

    Distance is one minus the cosine of visual tokens. First comes the token farthest from its nearest neighbour, then
    always the one farthest from those chosen. Positions are renumbered.

    Args:
        backbone: prices the plans.
        seed: not used; nothing is drawn.
    """

    def __init__(self, backbone: Backbone, seed: int = 0):
        super().__init__(backbone, "divprune")

    def making(self, encoding: Encoding, counts_B: Tensor) -> Tensor:
        _, n, width = encoding.visual_BND.shape
        return torch.full_like(counts_B, 2 * n * n * width)

    def ranks(self, encoding: Encoding, most: int) -> Tensor:
        valid_BN = encoding.visual_valid_BN
        distance_BNN = 1 - _alike(encoding.visual_BND)
        itself_BNN = torch.eye(valid_BN.shape[1], dtype=torch.bool, device=valid_BN.device)
        others_BNN = distance_BNN.masked_fill(itself_BNN | ~valid_BN[:, None], torch.inf)
        nearest_BN = others_BNN.amin(2).masked_fill(~valid_BN, -torch.inf)
        ranks_BN = torch.full(valid_BN.shape, valid_BN.shape[1], device=valid_BN.device)
        for step in range(most):
            next_B1 = nearest_BN.argmax(1, keepdim=True)
            _note(ranks_BN, next_B1, step)
            row_BN = distance_BNN.gather(1, next_B1[..., None].expand(-1, 1, valid_BN.shape[1]))[:, 0]
            nearest_BN = row_BN if step == 0 else nearest_BN.minimum(row_BN)
            nearest_BN = nearest_BN.masked_fill((ranks_BN <= step) | ~valid_BN, -torch.inf)
        return ranks_BN


class CDPrunerPlanner(GreedyPlanner):
    """CDPruner (Zhang et al., arXiv 2506.10967, NeurIPS 2025): the most probable subset of a determinantal point
    process whose kernel is the tokens' cosine similarity, weighed by how much each has to do with the question.

    The authors take a token's relevance from CLIP's text encoder, which no supported checkpoint carries; here it is the
    cosine of visual token and words in the language model's embedding, averaged over the prompt, hence
    ``@embeddings`` in the name. It is scaled to [0, 1] image by image. Positions are renumbered.

    Args:
        backbone: prices the plans.
        seed: not used; nothing is drawn.
        relevance: ``alike``: relevant is what resembles the words; ``unlike``: the reverse, as CLIP's patches need it.
    """

    def __init__(self, backbone: Backbone, seed: int = 0, relevance: Literal["alike", "unlike"] = "alike"):
        super().__init__(backbone, "cdpruner@embeddings")
        self.sign = 1 if relevance == "alike" else -1

    def making(self, encoding: Encoding, counts_B: Tensor) -> Tensor:
        _, n, width = encoding.visual_BND.shape
        return 2 * n * width * (n + 1) + n * counts_B * (counts_B - 1)

    def relevance(self, encoding: Encoding) -> Tensor:
        """(B, N) in about [0, 1]."""
        valid_BN = encoding.visual_valid_BN
        words_BTD = F.normalize(encoding.text_BTD.float(), dim=-1) * encoding.text_valid_BT[..., None]
        mean_BD1 = (words_BTD.sum(1) / encoding.text_tokens[:, None])[..., None]
        scores_BN = self.sign * (F.normalize(encoding.visual_BND.float(), dim=-1) @ mean_BD1)[..., 0]
        low_B1 = scores_BN.masked_fill(~valid_BN, torch.inf).amin(1, keepdim=True)
        high_B1 = scores_BN.masked_fill(~valid_BN, -torch.inf).amax(1, keepdim=True)
        return (scores_BN - low_B1 + 1e-6) / (high_B1 - low_B1).clamp_min(1e-6)

    def ranks(self, encoding: Encoding, most: int) -> Tensor:
        """Greedy MAP inference by a growing Cholesky factor (Chen et al., NeurIPS 2018)."""
        valid_BN, relevance_BN = encoding.visual_valid_BN, self.relevance(encoding)
        kernel_BNN = relevance_BN[:, :, None] * _alike(encoding.visual_BND) * relevance_BN[:, None]
        gain_BN = kernel_BNN.diagonal(dim1=1, dim2=2).masked_fill(~valid_BN, -torch.inf)
        ranks_BN = torch.full(valid_BN.shape, valid_BN.shape[1], device=valid_BN.device)
        factor_BMN = kernel_BNN.new_zeros(len(valid_BN), most, valid_BN.shape[1])
        for step in range(most):
            # Beyond the kernel's rank gains are rounding errors; nothing tells tokens apart, the earlier come first.
            clear_BN = gain_BN.where((gain_BN > LEAST_GAIN) | gain_BN.isinf(), 0.0)
            next_B1 = clear_BN.argmax(1, keepdim=True)
            _note(ranks_BN, next_B1, step)
            row_BN = kernel_BNN.gather(1, next_B1[..., None].expand(-1, 1, valid_BN.shape[1]))[:, 0]
            if step:
                column_B1M = factor_BMN[:, :step].gather(2, next_B1[:, None].expand(-1, step, 1)).transpose(1, 2)
                row_BN = row_BN - (column_B1M @ factor_BMN[:, :step])[:, 0]
            gain_B1 = gain_BN.gather(1, next_B1)
            row_BN = row_BN * (gain_B1 > LEAST_GAIN) / gain_B1.clamp_min(LEAST_GAIN).sqrt()
            factor_BMN[:, step] = row_BN
            gain_BN = (gain_BN - row_BN.square()).masked_fill((ranks_BN <= step) | ~valid_BN, -torch.inf)
        return ranks_BN


def _note(ranks_BN: Tensor, next_B1: Tensor, step: int) -> None:
    """A token's rank is the step at which it is first chosen: rows with fewer tokens than others run out earlier."""
    ranks_BN.scatter_(1, next_B1, ranks_BN.gather(1, next_B1).clamp_max(step))


def _alike(x_BND: Tensor) -> Tensor:
    """(B, N, N) cosines, rounded: equal tokens (padding, line ends) must tie, whatever else is in the batch."""
    unit_BND = F.normalize(x_BND.float(), dim=-1)
    return (unit_BND @ unit_BND.transpose(1, 2)).round(decimals=DECIMALS)
