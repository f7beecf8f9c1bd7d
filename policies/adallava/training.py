"""The loss of AdaLLaVA's scheduler: the answer's, under exactly as many units as the budget pays for, and no other.

Shape legend: B rows, D hidden width, T answer tokens of all rows, V vocabulary.
"""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from maskgym.backbones.encodings.encoding import Encoding
from maskgym.backbones.soft_decoder import Gates, SoftMidway, soft_answer_logits
from maskgym.policies.adallava.scheduler import AdaLlavaPlanner
from maskgym.policies.relaxation.training import RelaxationSettings, RelaxedBatch, answer_targets


class AdaLlavaLearner:
    """Trains a scheduler.

    Args:
        planner: of the scheduler.
        settings: the temperatures; the original's is 5 throughout.
    """

    more_tokens = 1

    def __init__(self, planner: AdaLlavaPlanner, settings: RelaxationSettings):
        self.planner, self.settings = planner, settings
        self.controller = planner.scheduler

    def least_share(self, prompts: Encoding) -> Tensor:
        return self.planner.least_share(prompts)

    @torch.no_grad()
    def soft_flops(self, prompts: Encoding, budgets_B: Tensor) -> Tensor:
        return self._flops(prompts, self.planner.units(prompts, budgets_B))

    def losses(self, batch: RelaxedBatch, progress: float) -> dict[str, Tensor]:
        """As ``Learner`` has them; the price of the plans is met exactly, so there is no loss for it."""
        planner, backbone, scheduler = self.planner, self.planner.backbone, self.planner.scheduler
        with torch.no_grad():
            units_B = planner.units(batch.prompts, batch.budgets_B)
            spent_B = self._flops(batch.prompts, units_B) / backbone.full_llm_flops(batch.prompts)
        answered = _with_token(batch, scheduler.token(units_B))
        everything = Gates.of(backbone.full(answered))

        def choose(state_BD: Tensor) -> Gates:
            drawn = scheduler.draw(state_BD, units_B, self.settings.temperature(progress), noise=True)
            return Gates(everything.tokens, drawn.heads, drawn.layers)

        midway = SoftMidway(scheduler.config.prefix_layers, choose)
        logits_TV = soft_answer_logits(backbone, answered, everything, batch.answers, midway)
        losses_T = F.cross_entropy(logits_TV, answer_targets(backbone, batch.answers), reduction="none")
        answer = losses_T.sum() / len(batch.answers)
        return {"answer": answer, "soft_flops": spent_B.mean(), "log_likelihood": -answer.detach()}

    def _flops(self, prompts: Encoding, units_B: Tensor) -> Tensor:
        plans = self.planner.plan_units(prompts, units_B)
        return self.planner.backbone.cost(prompts, plans, self.planner.scheduler.flops()).llm


def _with_token(batch: RelaxedBatch, token_BD: Tensor) -> Encoding:
    """The answered prompts with the latency token where a place is kept for it, between prompt and answer."""
    text_BTD = batch.answered.text_BTD
    rows_B = torch.arange(len(text_BTD), device=text_BTD.device)
    text_BTD = text_BTD.index_put((rows_B, batch.prompts.text_tokens), token_BD.to(text_BTD.dtype))
    return replace(batch.answered, text_BTD=text_BTD)
