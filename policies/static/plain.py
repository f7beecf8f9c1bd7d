"""Rules that look at nothing: random visual tokens, and evenly spaced ones.

Shape legend: B rows, N visual tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor

from maskgym.backbones.backbone import Backbone
from maskgym.backbones.encodings.encoding import Encoding
from maskgym.backbones.plans.stages import best_tokens
from maskgym.policies.static.counts import TokenPlanner


class RandomTokenPlanner(TokenPlanner):
    """Random visual tokens; random pruning beats most published rules (UniPruneBench).

    Args:
        backbone: prices the plans.
        seed: of the draws.
    """

    def __init__(self, backbone: Backbone, seed: int = 0):
        super().__init__(backbone, "random-tokens")
        self.generator = torch.Generator().manual_seed(seed)

    def choose(self, encoding: Encoding, counts_B: Tensor) -> Tensor:
        valid_BN = encoding.visual_valid_BN
        scores_BN = torch.rand(valid_BN.shape, generator=self.generator).to(valid_BN.device)
        return best_tokens(scores_BN, valid_BN, counts_B)


class StridePlanner(TokenPlanner):
    """Visual tokens at even distances in reading order, the first half a step from the start.

    Args:
        backbone: prices the plans.
        seed: not used; nothing is drawn.
    """

    def __init__(self, backbone: Backbone, seed: int = 0):
        super().__init__(backbone, "stride")

    def choose(self, encoding: Encoding, counts_B: Tensor) -> Tensor:
        return evenly_spaced(encoding.visual_valid_BN, counts_B)


def evenly_spaced(among_BN: Tensor, counts_B: Tensor) -> Tensor:
    """(B, N) bool: ``counts_B`` of some tokens, at even distances in their order."""
    most_B1, counts_B1 = among_BN.sum(1, keepdim=True), counts_B[:, None]
    rank_BN = among_BN.cumsum(1) - 1
    # Token r is the j-th chosen one if r = floor((2 j + 1) most / (2 counts)): its half step lies in the token.
    before_BN = (2 * rank_BN * counts_B1 + most_B1 - 1).div(2 * most_B1.clamp_min(1), rounding_mode="floor")
    upto_BN = (2 * (rank_BN + 1) * counts_B1 + most_B1 - 1).div(2 * most_B1.clamp_min(1), rounding_mode="floor")
    return among_BN & (upto_BN > before_BN)
