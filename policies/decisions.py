"""The controller's decisions as independent bits within a level, and the step from encodings to plans.

Shape legend: B rows, A flat action length, A2 decisions of the second level, N visual tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from backbones.backbone import Backbone
from backbones.encoding import Encoding
from backbones.masks import Masks
from policies.controller import Reading, TwoLevelController
from policies.projection import budget_flops, project


@dataclass(frozen=True)
class Decisions:
    """Both levels' keep-logits for one batch, and the bits chosen.

    Attributes:
        logits_BA: in flat-action order; the second level's given the first level's bits.
        bits_BA: bool, the action.
        free_BA: bool, False where nothing is decided: protected units, units of axes that the controller leaves alone,
            and visual tokens that the image does not have.
    """

    logits_BA: Tensor
    bits_BA: Tensor
    free_BA: Tensor

    def log_prob(self) -> Tensor:
        """(B,) joint log-probability of the bits: the sum over both levels."""
        log_probs_BA = -F.binary_cross_entropy_with_logits(self.logits_BA, self.bits_BA.float(), reduction="none")
        return (log_probs_BA * self.free_BA).sum(1)

    def entropy(self) -> Tensor:
        """(B,) entropy of the first level plus that of the second given the chosen tokens: a one-sample estimate of
        the joint entropy H(tokens) + E[H(rest | tokens)]."""
        probability_BA = self.logits_BA.sigmoid()
        return (F.softplus(self.logits_BA) - self.logits_BA * probability_BA).mul(self.free_BA).sum(1)


class Decider:
    """Drives a controller on a backbone's encodings.

    Args:
        controller: gives logits.
        backbone: knows the layout and prices plans.
    """

    def __init__(self, controller: TwoLevelController, backbone: Backbone):
        self.controller = controller
        self.backbone = backbone
        self.layout = backbone.layout
        self.axes = controller.config.axes
        self.free_A = ~backbone.layout.protected(backbone.device, self.axes)

    def controller_flops(self, encoding: Encoding) -> Tensor:
        """(B,) FLOPs of each row's decision."""
        return self.controller.flops(encoding.text_tokens)

    def read(self, encoding: Encoding, budgets_B: Tensor) -> Reading:
        return self.controller.read(
            encoding.visual_BND, encoding.visual_valid_BN, encoding.text_BTD, encoding.text_valid_BT, budgets_B
        )

    def free(self, encoding: Encoding) -> Tensor:
        """(B, A) bool: the bits on which something is decided."""
        free_BA = self.free_A.expand(len(encoding), -1).clone()
        free_BA[:, self.layout.level1] &= encoding.visual_valid_BN
        return free_BA

    def budget_left(self, encoding: Encoding, kept_BN: Tensor, budgets_B: Tensor) -> Tensor:
        """(B,) share of the cost of all heads and layers at the kept tokens that the budget still pays for."""
        full = self.layout.full(len(encoding), kept_BN.device)
        whole_B = self.backbone.cost(encoding, Masks(kept_BN, full.heads, full.layers)).llm
        limit_B = budget_flops(budgets_B, self.backbone.full_llm_flops(encoding))
        return (limit_B - self.controller_flops(encoding)).clamp_min(0) / whole_B

    def decide(self, encoding: Encoding, reading: Reading, budgets_B: Tensor, sample: bool) -> Decisions:
        """Choose both levels in turn: by drawing, or every unit whose logit is positive."""
        token_logits_BN = self.controller.token_logits(reading)
        free_N = self.free_A[self.layout.level1]
        kept_BN = (_choose(token_logits_BN, sample) | ~free_N) & encoding.visual_valid_BN
        left_B = self.budget_left(encoding, kept_BN, budgets_B)
        llm_logits = self.controller.llm_logits(reading, kept_BN, left_B)
        bits_BA = torch.cat([kept_BN, _choose(llm_logits, sample)], dim=1) | ~self.free_A
        return Decisions(torch.cat([token_logits_BN, llm_logits], dim=1), bits_BA, self.free(encoding))

    def review(self, encoding: Encoding, reading: Reading, budgets_B: Tensor, bits_BA: Tensor) -> Decisions:
        """The same logits for bits that were chosen earlier."""
        kept_BN = bits_BA[:, self.layout.level1]
        left_B = self.budget_left(encoding, kept_BN, budgets_B)
        llm_logits = self.controller.llm_logits(reading, kept_BN, left_B)
        logits_BA = torch.cat([self.controller.token_logits(reading), llm_logits], dim=1)
        return Decisions(logits_BA, bits_BA, self.free(encoding))

    def fit(self, encoding: Encoding, decisions: Decisions, budgets_B: Tensor) -> Masks:
        """The decided plans, projected into their budgets with the logits as confidence."""
        fill = self.controller.config.rule == "fill"
        masks = self.backbone.full(encoding) if fill else self.layout.unflatten(decisions.bits_BA)
        flops = self.controller_flops(encoding)
        return project(self.backbone, masks, decisions.logits_BA, budgets_B, encoding, flops, self.axes)


def _choose(logits: Tensor, sample: bool) -> Tensor:
    return torch.rand_like(logits) < logits.sigmoid() if sample else logits > 0
