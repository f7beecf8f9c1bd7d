"""Decisions relaxed so that gradients pass: Gumbel straight-through, and a soft top-k under the budget.

Both drive the same controller in the same order as ``Decider``: tokens, then heads and layers given the tokens kept and
the budget left. They differ from policy gradients in one thing only, how the loss reaches the logits.

Shape legend: B rows, A flat action length, N visual tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from maskgym.backbones.encodings.encoding import Encoding
from maskgym.backbones.soft_decoder import Gates
from maskgym.policies.controller.decisions import Decider, Decisions

ESTIMATORS = ("gumbel", "soft-topk", "adallava-l", "adallava-h")


@dataclass(frozen=True)
class Relaxed:
    """A batch of relaxed plans.

    Attributes:
        gates_BA: what the model runs with, in flat-action order.
        soft_BA: what is priced: the same but for straight-through estimators, whose gates are 0 and 1.
    """

    gates_BA: Tensor
    soft_BA: Tensor

    def gates(self, decider: Decider) -> Gates:
        return decider.gates(self.gates_BA)

    def flops(self, decider: Decider, encoding: Encoding) -> Tensor:
        """(B,) relaxed FLOPs, the controller's own included."""
        return decider.flops(encoding, decider.gates(self.soft_BA)) + decider.controller_flops(encoding)


def gumbel_straight_through(
    decider: Decider, encoding: Encoding, budgets_B: Tensor, temperature: float, fit: bool = True
) -> Relaxed:
    """Binary Gumbel-softmax with straight-through gradients (Jang et al., ICLR 2017; Maddison et al., ICLR 2017).

    A unit is kept if its logit plus logistic noise is positive. The forward pass takes that bit, the backward pass the
    derivative of sigmoid((logit + noise) / temperature).

    Args:
        decider: drives the controller.
        encoding: B queries.
        budgets_B: shares of the full plan's LLM FLOPs.
        temperature: of the relaxation; high is smooth and biased, low is steep and noisy.
        fit: whether the bits are projected into the budget, as they are when the controller is used; the projection
            passes gradients straight through too.
    """
    read = decider.read(encoding, budgets_B)
    free_BA = decider.free(encoding)
    free_BN = free_BA[:, decider.layout.level1]
    token_logits_BN = _with_noise(decider.token_logits(read))
    soft_BN = _soft(token_logits_BN, free_BN, temperature)
    kept_BN = (token_logits_BN > 0) | ~free_BN
    gates_BN = _straight_through(kept_BN, soft_BN) * encoding.visual_valid_BN
    llm_logits = _with_noise(decider.llm_logits(read, gates_BN))
    logits_BA = torch.cat([token_logits_BN, llm_logits], dim=1)
    soft_BA = torch.cat([soft_BN, _soft(llm_logits, free_BA[:, decider.layout.level2], temperature)], dim=1)
    bits_BA = (logits_BA > 0) | ~free_BA
    if fit:
        masks = decider.fit(read, Decisions(logits_BA.detach(), bits_BA, free_BA))
        bits_BA = decider.layout.flatten(masks)
    return Relaxed(_straight_through(bits_BA, soft_BA), soft_BA)


def soft_top_k(
    decider: Decider, encoding: Encoding, budgets_B: Tensor, temperature: float, noise: float = 0.0
) -> Relaxed:
    """Sigmoids shifted, row by row, until the relaxed plan costs its budget: a top-k whose k is counted in FLOPs.

    Deterministic but for optional Gaussian noise on the logits; the gradient through the shift is exact. Needs a
    controller with the ``fill`` rule: as the temperature falls the gates approach the plan that this rule executes.

    Args:
        decider: drives the controller.
        encoding: B queries.
        budgets_B: shares of the full plan's LLM FLOPs.
        temperature: of the sigmoids.
        noise: standard deviation of the noise; it keeps units apart from the threshold, so that little is lost when the
            gates become bits.
    """
    read = decider.read(encoding, budgets_B)
    free_BA = decider.free(encoding)
    free_BN = free_BA[:, decider.layout.level1]
    token_logits_BN = decider.token_logits(read, temperature)
    token_logits_BN = token_logits_BN + noise * torch.randn_like(token_logits_BN)
    gates_BN = _soft(token_logits_BN, free_BN, temperature) * encoding.visual_valid_BN
    llm_logits = decider.llm_logits(read, gates_BN, temperature)
    llm_logits = llm_logits + noise * torch.randn_like(llm_logits)
    gates_BA = torch.cat([gates_BN, _soft(llm_logits, free_BA[:, decider.layout.level2], temperature)], dim=1)
    return Relaxed(gates_BA, gates_BA)


def _with_noise(logits: Tensor) -> Tensor:
    """Logits plus standard logistic noise, the difference of two Gumbel variables."""
    uniform = torch.rand_like(logits).clamp(1e-6, 1 - 1e-6)
    return logits + uniform.logit()


def _soft(logits: Tensor, free: Tensor, temperature: float) -> Tensor:
    """Sigmoids of the logits; 1 where nothing is decided."""
    return (logits / temperature).sigmoid().where(free, 1.0)


def _straight_through(bits: Tensor, soft: Tensor) -> Tensor:
    """The bits, with the derivative of ``soft``."""
    return bits.to(soft.dtype) + (soft - soft.detach())


def cost_loss(kind: str, spent_B: Tensor, budgets_B: Tensor, under: float = 0.1) -> Tensor:
    """Mean price of what relaxed plans spend.

    Args:
        kind: ``"penalty"``: the share of FLOPs spent; ``"budget"``: the squared relative overspend, and ``under`` times
            the share left unspent.
        spent_B: share of the full plan's LLM FLOPs.
        budgets_B: the share that may be spent.
        under: weight of leaving budget unspent.
    """
    if kind == "penalty":
        return spent_B.mean()
    over_B = F.relu(spent_B - budgets_B) / budgets_B
    return (over_B.square() + under * F.relu(budgets_B - spent_B)).mean()
