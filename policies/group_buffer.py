"""A rollout buffer whose baseline is what the other plans of the same query earned."""

from __future__ import annotations

from typing import Any

import numpy as np
from stable_baselines3.common.buffers import DictRolloutBuffer
from torch import Tensor


class GroupRolloutBuffer(DictRolloutBuffer):
    """Advantage = reward minus the mean reward of the other plans for the same query and budget (leave-one-out,
    Kool et al. 2019), which takes the query's difficulty out exactly where a critic must learn it.

    Episodes have one step, so there is nothing to bootstrap. With one plan a query it is SB3's own buffer, whose
    advantage is then reward minus value.

    Args:
        plans_per_query: G; consecutive environments form groups of G.
    """

    def __init__(self, *arguments: Any, plans_per_query: int = 1, **options: Any):
        super().__init__(*arguments, **options)
        self.plans_per_query = plans_per_query

    def compute_returns_and_advantage(self, last_values: Tensor, dones: np.ndarray) -> None:
        super().compute_returns_and_advantage(last_values, dones)
        if self.plans_per_query > 1:
            groups = self.rewards.reshape(self.buffer_size, -1, self.plans_per_query)
            others = (groups.sum(2, keepdims=True) - groups) / (self.plans_per_query - 1)
            self.advantages = (groups - others).reshape(self.rewards.shape)
