"""The loss of a controller trained by relaxation: the answer's, through gated execution, plus the price of the plan.

Shape legend: B rows, T answer tokens of all rows, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from maskgym.backbones.backbone import Backbone
from maskgym.backbones.encodings.encoding import Encoding
from maskgym.backbones.soft_decoder import Gates, soft_answer_logits
from maskgym.common.errors import InputError
from maskgym.policies.controller.decisions import Decider
from maskgym.policies.controller.learned import Controller
from maskgym.policies.planning.projection import least_share
from maskgym.policies.relaxation.estimators import ESTIMATORS, Relaxed, cost_loss, gumbel_straight_through, soft_top_k

COST_LOSSES = ("budget", "penalty")


class Learner(Protocol):
    """What a training by relaxation needs of a kind of controller.

    Attributes:
        controller: is trained.
        more_tokens: places to keep free between prompt and answer.
    """

    more_tokens: int

    @property
    def controller(self) -> Controller: ...

    def least_share(self, prompts: Encoding) -> Tensor:
        """(B,) float64: the smallest budgets for which there is a plan."""
        ...

    def soft_flops(self, prompts: Encoding, budgets_B: Tensor) -> Tensor:
        """(B,) FLOPs of the relaxed plans at the end of the training, the controller's included."""
        ...

    def losses(self, batch: RelaxedBatch, progress: float) -> dict[str, Tensor]:
        """Parts of a batch's loss, after a share of the training: ``answer``, ``cost``, ``distillation``, as far as it
        has them; and, beside them, without gradient, ``soft_flops``: the share of the full FLOPs that the relaxed plans
        cost, and ``log_likelihood`` of the answers."""
        ...


@dataclass(frozen=True)
class RelaxationSettings:
    """How a controller is relaxed and what its loss weighs.

    Attributes:
        estimator: ``"gumbel"``, ``"soft-topk"``, or one of AdaLLaVA's, of which only the temperatures count.
        temperatures: at the start and at the end; geometric in between.
        noise: of the soft top-k's logits, at the start; it falls linearly to zero.
        fit: whether Gumbel's bits are projected into the budget in training, too.
        cost: ``"budget"`` or ``"penalty"``; the soft top-k meets its budget by construction and has no price.
        cost_weight: of the price, after ``warm_up``.
        warm_up: share of the training in which the price rises from zero to its weight.
        distillation: weight of the divergence from the full plan's answer.
    """

    estimator: str = "gumbel"
    temperatures: tuple[float, float] = (2.0, 0.5)
    noise: float = 0.0
    fit: bool = True
    cost: str = "budget"
    cost_weight: float = 1.0
    warm_up: float = 0.2
    distillation: float = 0.0

    def __post_init__(self) -> None:
        ends = self.temperatures
        rules = [
            ("estimator", self.estimator in ESTIMATORS, f"one of {', '.join(ESTIMATORS)}"),
            ("cost", self.cost in COST_LOSSES, f"one of {', '.join(COST_LOSSES)}"),
            ("temperatures", 0 < ends[1] <= ends[0] < 1000, "two with 0 < last <= first < 1000"),
            ("noise", 0 <= self.noise < 1000, "at least 0"),
            ("cost_weight", 0 <= self.cost_weight < 1e6, "at least 0"),
            ("warm_up", 0 <= self.warm_up <= 1, "a share of the training, between 0 and 1"),
            ("distillation", 0 <= self.distillation < 1e6, "at least 0"),
        ]
        for name, holds, expected in rules:
            if not holds:
                raise InputError(f"--{name.replace('_', '-')} is {getattr(self, name)}; it must be {expected}")

    def temperature(self, progress: float) -> float:
        """After a share of the training."""
        first, last = self.temperatures
        return first * (last / first) ** progress

    def price(self, progress: float) -> float:
        """Weight of the price after a share of the training."""
        return self.cost_weight * min(1.0, progress / self.warm_up if self.warm_up else 1.0)


def relax(
    settings: RelaxationSettings, decider: Decider, encoding: Encoding, budgets_B: Tensor, progress: float
) -> Relaxed:
    """Relaxed plans of a batch, after a share of the training."""
    temperature = settings.temperature(progress)
    if settings.estimator == "gumbel":
        return gumbel_straight_through(decider, encoding, budgets_B, temperature, settings.fit)
    return soft_top_k(decider, encoding, budgets_B, temperature, settings.noise * (1 - progress))


@dataclass(frozen=True)
class RelaxedBatch:
    """Queries, what to answer, and what may be spent.

    Attributes:
        prompts: B encodings.
        answered: the same, followed by as many places as the learner wants and by their answers.
        answers: ids of each row's answer, without an end token.
        budgets_B: shares of the full plan's LLM FLOPs.
    """

    prompts: Encoding
    answered: Encoding
    answers: Sequence[list[int]]
    budgets_B: Tensor


class RelaxedLearner:
    """Trains a two-level controller.

    Args:
        decider: drives the controller.
        settings: estimator and weights.
    """

    more_tokens = 0

    def __init__(self, decider: Decider, settings: RelaxationSettings):
        self.decider, self.settings = decider, settings
        self.controller = decider.controller

    def least_share(self, prompts: Encoding) -> Tensor:
        flops_B = self.decider.controller_flops(prompts)
        return least_share(self.decider.backbone, prompts, flops_B, self.decider.axes)

    @torch.no_grad()
    def soft_flops(self, prompts: Encoding, budgets_B: Tensor) -> Tensor:
        relaxed = relax(self.settings, self.decider, prompts, budgets_B, progress=1.0)
        return relaxed.flops(self.decider, prompts)

    def losses(self, batch: RelaxedBatch, progress: float) -> dict[str, Tensor]:
        settings, decider, backbone = self.settings, self.decider, self.decider.backbone
        relaxed = relax(settings, decider, batch.prompts, batch.budgets_B, progress)
        logits_TV = soft_answer_logits(backbone, batch.answered, relaxed.gates(decider), batch.answers)
        targets_T = answer_targets(backbone, batch.answers)
        token_losses_T = F.cross_entropy(logits_TV, targets_T, reduction="none")
        spent_B = relaxed.flops(decider, batch.prompts) / backbone.full_llm_flops(batch.prompts)
        parts = {"answer": token_losses_T.sum() / len(batch.answers)}
        if settings.estimator == "gumbel":
            parts["cost"] = settings.price(progress) * cost_loss(settings.cost, spent_B, batch.budgets_B).float()
        if settings.distillation:
            parts["distillation"] = settings.distillation * _divergence(backbone, batch, logits_TV)
        return {**parts, "soft_flops": spent_B.detach().mean(), "log_likelihood": -parts["answer"].detach()}


def answer_targets(backbone: Backbone, answers: Sequence[list[int]]) -> Tensor:
    """(T,) ids of the answers and their ends, row after row."""
    end = backbone.processor.tokenizer.eos_token_id
    return torch.tensor([token for ids in answers for token in [*ids, end]], device=backbone.device)


def _divergence(backbone: Backbone, batch: RelaxedBatch, logits_TV: Tensor) -> Tensor:
    """Of the relaxed plans' answers from the full plan's."""
    with torch.no_grad():
        everything = Gates.of(backbone.full(batch.answered))
        teacher_TV = soft_answer_logits(backbone, batch.answered, everything, batch.answers).log_softmax(-1)
    return F.kl_div(logits_TV.log_softmax(-1), teacher_TV, reduction="batchmean", log_target=True)
