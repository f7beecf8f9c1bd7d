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
from backbones.soft_decoder import Gates, soft_llm_flops
from policies.controller import Reading, TwoLevelController
from policies.filling import fill
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
        return self.log_prob_of_bits().sum(1)

    def log_prob_of_bits(self) -> Tensor:
        """(B, A) log-probability of each bit, given the first level's where it is of the second; 0 where nothing is
        decided."""
        log_probs_BA = -F.binary_cross_entropy_with_logits(self.logits_BA, self.bits_BA.float(), reduction="none")
        return log_probs_BA * self.free_BA

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
        fills = controller.config.rule == "fill"
        self.fills_llm = fills and bool(self.free_A[self.layout.level2].any())
        self.fills_tokens = fills and not self.fills_llm

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
        return self.limits(encoding, budgets_B).clamp_min(0) / whole_B

    def limits(self, encoding: Encoding, budgets_B: Tensor) -> Tensor:
        """(B,) FLOPs that the budgets leave to the plans, the controller's own taken off."""
        return budget_flops(budgets_B, self.backbone.full_llm_flops(encoding)) - self.controller_flops(encoding)

    def token_logits(self, encoding: Encoding, reading: Reading, budgets_B: Tensor, temperature: float = 1.0) -> Tensor:
        """Level 1: keep-logits (B, N); under the ``fill`` rule, where no other level is decided, they spend the budget
        in expectation."""
        logits_BN = self.controller.token_logits(reading)
        if not self.fills_tokens:
            return logits_BN
        rest = Gates.of(self.layout.full(len(encoding), logits_BN.device))

        def price(gates_BN: Tensor) -> Tensor:
            return soft_llm_flops(self.backbone, encoding, Gates(gates_BN, rest.heads, rest.layers))

        free_BN = self.free(encoding)[:, self.layout.level1]
        return fill(logits_BN, free_BN, price, self.limits(encoding, budgets_B), temperature)

    def llm_logits(
        self,
        encoding: Encoding,
        reading: Reading,
        kept_BN: Tensor,
        budgets_B: Tensor,
        gates_BN: Tensor | None = None,
        temperature: float = 1.0,
    ) -> Tensor:
        """Level 2: keep-logits (B, A2) given the tokens kept; under the ``fill`` rule they spend in expectation what
        the budget leaves.

        Args:
            encoding: B queries.
            reading: of them.
            kept_BN: bool, the tokens kept.
            budgets_B: shares of the full plan's LLM FLOPs.
            gates_BN: the same, relaxed, if gradients are to reach level 1 through level 2.
            temperature: of relaxed plans.
        """
        tokens_BN = kept_BN.float() if gates_BN is None else gates_BN
        left_B = self.budget_left(encoding, kept_BN, budgets_B)
        logits = self.controller.llm_logits(reading, tokens_BN, left_B)
        if not self.fills_llm:
            return logits

        def price(gates: Tensor) -> Tensor:
            return soft_llm_flops(self.backbone, encoding, self.gates(torch.cat([tokens_BN, gates], dim=1)))

        free = self.free_A[self.layout.level2].expand_as(logits)
        return fill(logits, free, price, self.limits(encoding, budgets_B), temperature)

    def gates(self, flat_BA: Tensor) -> Gates:
        """Relaxed plans from flat numbers in [0, 1]."""
        layout = self.layout
        tokens, heads, layers = flat_BA.split([layout.tokens, layout.layers * layout.heads, layout.layers], dim=1)
        return Gates(tokens, heads.unflatten(1, (layout.layers, layout.heads)), layers)

    def decide(self, encoding: Encoding, reading: Reading, budgets_B: Tensor, sample: bool) -> Decisions:
        """Choose both levels in turn: by drawing; or every unit whose logit is positive, but on the level that fills
        the budget every unit, for ``fit`` to drop the least confident of them."""
        token_logits_BN = self.token_logits(encoding, reading, budgets_B)
        free_N = self.free_A[self.layout.level1]
        kept_BN = _choose(token_logits_BN, sample, self.fills_tokens) | ~free_N
        kept_BN = kept_BN & encoding.visual_valid_BN
        llm_logits = self.llm_logits(encoding, reading, kept_BN, budgets_B)
        bits_BA = torch.cat([kept_BN, _choose(llm_logits, sample, self.fills_llm)], dim=1) | ~self.free_A
        return Decisions(torch.cat([token_logits_BN, llm_logits], dim=1), bits_BA, self.free(encoding))

    def review(self, encoding: Encoding, reading: Reading, budgets_B: Tensor, bits_BA: Tensor) -> Decisions:
        """The same logits for bits that were chosen earlier."""
        llm_logits = self.llm_logits(encoding, reading, bits_BA[:, self.layout.level1], budgets_B)
        logits_BA = torch.cat([self.token_logits(encoding, reading, budgets_B), llm_logits], dim=1)
        return Decisions(logits_BA, bits_BA, self.free(encoding))

    def fit(self, encoding: Encoding, decisions: Decisions, budgets_B: Tensor) -> Masks:
        """The decided plans, projected into their budgets with the logits as confidence."""
        masks = self.layout.unflatten(decisions.bits_BA)
        flops = self.controller_flops(encoding)
        return project(self.backbone, masks, decisions.logits_BA, budgets_B, encoding, flops, self.axes)


def _choose(logits: Tensor, sample: bool, fills: bool) -> Tensor:
    if sample:
        return torch.rand_like(logits) < logits.sigmoid()
    return torch.ones_like(logits, dtype=torch.bool) if fills else logits > 0
