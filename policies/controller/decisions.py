"""The controller's decisions as independent bits within a level, and the step from encodings to plans.

Shape legend: B rows, A flat action length, A2 decisions of the second level, N visual tokens.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from maskgym.backbones.backbone import Backbone
from maskgym.backbones.encodings.encoding import Encoding
from maskgym.backbones.plans.masks import Masks
from maskgym.backbones.plans.plan_cost import laying_out_flops
from maskgym.backbones.plans.stages import best_tokens
from maskgym.backbones.plans.survivors import Survivors
from maskgym.backbones.soft_decoder import Gates, soft_llm_flops
from maskgym.common.finite import check_finite
from maskgym.policies.controller.filling import fill
from maskgym.policies.controller.network import Reading, TwoLevelController
from maskgym.policies.planning.projection import budget_flops, project


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


@dataclass(frozen=True)
class Budgeted:
    """A batch of queries that a controller has read, with what each may spend.

    Attributes:
        encoding: the queries.
        reading: what the controller made of them.
        limits_B: FLOPs that the budgets leave to the plans, the controller's own taken off.
        budgets_B: shares of the full plan's LLM FLOPs.
    """

    encoding: Encoding
    reading: Reading
    limits_B: Tensor
    budgets_B: Tensor


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
        self.fills = controller.config.rule == "fill"
        self.decides_tokens = bool(self.free_A[self.layout.level1].any())
        self.decides_llm = bool(self.free_A[self.layout.level2].any())

    def controller_flops(self, encoding: Encoding) -> Tensor:
        """(B,) FLOPs of each row's decision."""
        return self.controller.flops(encoding.text_tokens)

    def read(self, encoding: Encoding, budgets_B: Tensor) -> Budgeted:
        """Read queries, each with its share of the full plan's LLM FLOPs."""
        reading = self.controller.read(
            encoding.visual_BND, encoding.visual_valid_BN, encoding.text_BTD, encoding.text_valid_BT, budgets_B
        )
        affordable_B = budget_flops(budgets_B, self.backbone.full_llm_flops(encoding))
        return Budgeted(encoding, reading, affordable_B - self.controller_flops(encoding), budgets_B)

    def free(self, encoding: Encoding) -> Tensor:
        """(B, A) bool: the bits on which something is decided."""
        free_BA = self.free_A.expand(len(encoding), -1).clone()
        free_BA[:, self.layout.level1] &= encoding.visual_valid_BN
        return free_BA

    def survivors(self, encoding: Encoding) -> Survivors | None:
        """How the kept tokens are laid out; None: where they were."""
        config = self.controller.config
        return Survivors.asked(len(encoding), config.positions, config.merge, encoding.visual_BND.device)

    def flops(self, encoding: Encoding, gates: Gates) -> Tensor:
        """(B,) FLOPs of relaxed plans, laying out included and the controller not, differentiable; equal to the cost
        model's at gates of 0 and 1."""
        llm_B = soft_llm_flops(self.backbone, encoding, gates)
        survivors = self.survivors(encoding)
        if survivors is None:
            return llm_B
        shape, available_B = self.backbone.decoder.shape, encoding.visual_valid_BN.sum(1)
        kept_B = (gates.tokens.double() * encoding.visual_valid_BN).sum(1)
        return llm_B + laying_out_flops(shape, survivors, kept_B, kept_B, available_B, encoding.text_tokens)

    def _tokens_alone(self, encoding: Encoding, tokens_BN: Tensor) -> Tensor:
        """(B,) FLOPs of all heads and layers at these tokens, relaxed ones or bits."""
        rest = Gates.of(self.layout.full(len(encoding), tokens_BN.device))
        return self.flops(encoding, Gates(tokens_BN.double(), rest.heads, rest.layers))

    def budget_left(self, read: Budgeted, tokens_BN: Tensor) -> Tensor:
        """(B,) share of the cost of all heads and layers at the kept tokens that the budget still pays for."""
        return read.limits_B.clamp_min(0) / self._tokens_alone(read.encoding, tokens_BN.detach())

    def token_logits(self, read: Budgeted, temperature: float = 1.0) -> Tensor:
        """Level 1: keep-logits (B, N); under the ``fill`` rule shifted so that they spend the budget in expectation,
        together with what the second level would do."""
        logits_BN = self.controller.token_logits(read.reading)
        if not self.fills or not self.decides_tokens:
            return logits_BN
        encoding, limits_B = read.encoding, read.limits_B
        free_BA, valid_BN = self.free(encoding), encoding.visual_valid_BN
        if not self.decides_llm:
            free_BN = free_BA[:, self.layout.level1]
            return fill(logits_BN, free_BN, partial(self._tokens_alone, encoding), limits_B, temperature)
        # What the second level would do with all tokens says how the budget is split.
        whole = self._unshifted_llm_logits(read, valid_BN)

        def price(gates_BA: Tensor) -> Tensor:
            return self.flops(encoding, self.gates(gates_BA))

        logits_BA = torch.cat([logits_BN, whole], dim=1)
        return fill(logits_BA, free_BA, price, limits_B, temperature)[:, self.layout.level1]

    def llm_logits(self, read: Budgeted, tokens_BN: Tensor, temperature: float = 1.0) -> Tensor:
        """Level 2: keep-logits (B, A2) given the tokens kept; under the ``fill`` rule they spend in expectation what
        the budget leaves.

        Args:
            read: B queries.
            tokens_BN: the tokens kept: bool, or relaxed if gradients are to reach level 1 through level 2.
            temperature: of relaxed plans.
        """
        logits = self._unshifted_llm_logits(read, tokens_BN)
        if not self.fills or not self.decides_llm:
            return logits

        def price(gates: Tensor) -> Tensor:
            return self.flops(read.encoding, self.gates(torch.cat([tokens_BN, gates], dim=1)))

        free = self.free_A[self.layout.level2].expand_as(logits)
        return fill(logits, free, price, read.limits_B, temperature)

    def _unshifted_llm_logits(self, read: Budgeted, tokens_BN: Tensor) -> Tensor:
        return self.controller.llm_logits(read.reading, tokens_BN, self.budget_left(read, tokens_BN))

    def gates(self, flat_BA: Tensor) -> Gates:
        """Relaxed plans from flat numbers in [0, 1]."""
        layout = self.layout
        tokens, heads, layers = flat_BA.split([layout.tokens, layout.layers * layout.heads, layout.layers], dim=1)
        return Gates(tokens, heads.unflatten(1, (layout.layers, layout.heads)), layers)

    def decide(self, read: Budgeted, sample: bool) -> Decisions:
        """Choose both levels in turn: by drawing; or every unit whose logit is positive. Under the ``fill`` rule the
        most confident tokens, as many as are expected; on the last level that is decided every unit, for ``fit`` to
        drop the least confident of them."""
        return self._decide(read, sample, shift_last=True)

    def plan(self, read: Budgeted) -> Masks:
        """What ``fit`` makes of what ``decide`` chooses without drawing, for less: the last level's shift is not
        sought, since its units leave in the same order without."""
        return self.fit(read, self._decide(read, sample=False, shift_last=False))

    def _decide(self, read: Budgeted, sample: bool, shift_last: bool) -> Decisions:
        encoding = read.encoding
        shift_tokens = shift_last or self.decides_llm
        token_logits_BN = self.token_logits(read) if shift_tokens else self.controller.token_logits(read.reading)
        free_BN = self.free(encoding)[:, self.layout.level1]
        if sample:
            kept_BN = _draw(token_logits_BN)
        elif not self.fills:
            kept_BN = token_logits_BN > 0
        elif self.decides_llm:
            expected_B = (token_logits_BN.sigmoid() * free_BN).sum(1).round()
            kept_BN = best_tokens(token_logits_BN, free_BN, expected_B)
        else:
            kept_BN = torch.ones_like(free_BN)
        kept_BN = (kept_BN | ~self.free_A[self.layout.level1]) & encoding.visual_valid_BN
        llm_logits = self.llm_logits(read, kept_BN) if shift_last else self._unshifted_llm_logits(read, kept_BN)
        if sample:
            kept = _draw(llm_logits)
        else:
            kept = torch.ones_like(llm_logits, dtype=torch.bool) if self.fills else llm_logits > 0
        bits_BA = torch.cat([kept_BN, kept], dim=1) | ~self.free_A
        return self._checked(encoding, torch.cat([token_logits_BN, llm_logits], dim=1), bits_BA)

    def review(self, read: Budgeted, bits_BA: Tensor) -> Decisions:
        """The same logits for bits that were chosen earlier."""
        llm_logits = self.llm_logits(read, bits_BA[:, self.layout.level1] & read.encoding.visual_valid_BN)
        return self._checked(read.encoding, torch.cat([self.token_logits(read), llm_logits], dim=1), bits_BA)

    def _checked(self, encoding: Encoding, logits_BA: Tensor, bits_BA: Tensor) -> Decisions:
        check_finite("the controller's logits are", logits_BA, encoding.ids, "lower --learning-rate, or train it anew")
        return Decisions(logits_BA, bits_BA, self.free(encoding))

    def fit(self, read: Budgeted, decisions: Decisions) -> Masks:
        """The decided plans, laid out and projected into their budgets with the logits as confidence. Under the
        ``fill`` rule the last level that is decided makes room alone, as far as it can: it is what spends the rest."""
        encoding = read.encoding
        masks = replace(self.layout.unflatten(decisions.bits_BA), survivors=self.survivors(encoding))
        confidence_BA = decisions.logits_BA.detach().double()
        if self.fills and self.decides_llm:
            above_B1 = confidence_BA.amax(1, keepdim=True) - confidence_BA.amin(1, keepdim=True) + 1
            confidence_BA[:, self.layout.level1] += above_B1
        flops = self.controller_flops(encoding)
        return project(self.backbone, masks, confidence_BA, read.budgets_B, encoding, flops, self.axes)


def _draw(logits: Tensor) -> Tensor:
    """Bits with the probabilities that the logits stand for."""
    return torch.rand_like(logits) < logits.sigmoid()
