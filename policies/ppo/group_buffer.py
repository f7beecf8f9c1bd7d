"""A rollout buffer whose baseline is what the other plans of the same query earned, and whose plans may have several
probability ratios."""

from __future__ import annotations

from typing import Any

import numpy as np
from stable_baselines3.common.buffers import DictRolloutBuffer
from stable_baselines3.common.type_aliases import DictRolloutBufferSamples
from stable_baselines3.common.vec_env import VecNormalize
from torch import Tensor


class GroupRolloutBuffer(DictRolloutBuffer):
    """Advantage = reward minus the mean reward of the other plans for the same query and budget (leave-one-out,
    Kool et al. 2019), which takes the query's difficulty out exactly where a critic must learn it.

    Episodes have one step, so there is nothing to bootstrap. With one plan a query it is SB3's own buffer, whose
    advantage is then reward minus value.

    SB3's own update then works on several ratios a plan too: it multiplies (B, K) ratios with (B, 1) advantages.

    Args:
        plans_per_query: G; consecutive environments form groups of G.
        ratios: K, log-probabilities stored with each plan.
    """

    def __init__(self, *arguments: Any, plans_per_query: int = 1, ratios: int = 1, **options: Any):
        self.plans_per_query, self.ratios = plans_per_query, ratios
        super().__init__(*arguments, **options)

    def reset(self) -> None:
        super().reset()
        self.actions = np.zeros(self.actions.shape, np.int8)  # of bits; the space's own type takes eight bytes for each
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
            self.advantages = (groups - others).reshape(self.rewards.shape)
