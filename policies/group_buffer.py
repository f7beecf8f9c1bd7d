"""A rollout buffer whose baseline is what the other plans of the same query earned, and whose plans may have several
probability ratios."""

from __future__ import annotations

from typing import Any

import numpy as np
from stable_baselines3.common.buffers import DictRolloutBuffer
from stable_baselines3.common.type_aliases import DictRolloutBufferSamples
from stable_baselines3.common.vec_env import VecNormalize
from torch import Tensor

LEAST_DEVIATION = 0.1
"""Added to a group's standard deviation, in units of the reward: what differs by less is noise."""


class GroupRolloutBuffer(DictRolloutBuffer):
    """Advantage = reward minus the mean reward of the other plans for the same query and budget (leave-one-out,
    Kool et al. 2019), which takes the query's difficulty out exactly where a critic must learn it. On request it is
    divided by the standard deviation within the group (GRPO, arXiv 2402.03300), so that every query counts alike,
    however much its plans differ.

    Episodes have one step, so there is nothing to bootstrap. With one plan a query it is SB3's own buffer, whose
    advantage is then reward minus value.

    SB3's own update then works on several ratios a plan too: it multiplies (B, K) ratios with (B, 1) advantages.

    Args:
        plans_per_query: G; consecutive environments form groups of G.
        scaled: whether advantages are divided by their group's standard deviation, and ``LEAST_DEVIATION``.
        ratios: K, log-probabilities stored with each plan.
    """

    def __init__(
        self, *arguments: Any, plans_per_query: int = 1, scaled: bool = False, ratios: int = 1, **options: Any
    ):
        self.plans_per_query, self.scaled, self.ratios = plans_per_query, scaled, ratios
        super().__init__(*arguments, **options)

    def reset(self) -> None:
        super().reset()
        self.log_probs = np.zeros((self.buffer_size, self.n_envs, self.ratios), dtype=np.float32)

    def _get_samples(  # type: ignore[override]
        self, batch_inds: np.ndarray, env: VecNormalize | None = None
    ) -> DictRolloutBufferSamples:
        samples = super()._get_samples(batch_inds, env)
        log_probs = samples.old_log_prob.view(-1, self.ratios)
        return samples._replace(old_log_prob=log_probs, advantages=samples.advantages[:, None])

    def compute_returns_and_advantage(self, last_values: Tensor, dones: np.ndarray) -> None:
        super().compute_returns_and_advantage(last_values, dones)
        if self.plans_per_query > 1:
            groups = self.rewards.reshape(self.buffer_size, -1, self.plans_per_query)
            others = (groups.sum(2, keepdims=True) - groups) / (self.plans_per_query - 1)
            scale = groups.std(2, keepdims=True) + LEAST_DEVIATION if self.scaled else 1.0
            self.advantages = ((groups - others) / scale).reshape(self.rewards.shape)
