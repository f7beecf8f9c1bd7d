"""A price of FLOPs that finds itself: dual ascent on the budget, bin by bin of budgets.

Shape legend: B rows, K bins.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from maskgym.envs.rewards import RewardTerms


class Lagrangian:
    """Accuracy minus a price times the relative overspend, the price of each budget bin rising while its plans spend
    more than they may on average, and falling while they spend less (never below 0).

    It asks for budgets that are met on average. Where plans are projected into their budgets before they are executed
    nothing is overspent, and prices stay 0.

    Args:
        bins: K, of equal width over (0, 1].
        rate: step of the prices, a batch.
    """

    __name__ = "lagrangian"

    def __init__(self, bins: int = 8, rate: float = 0.05):
        self.prices_K, self.rate = np.zeros(bins), rate

    def __call__(self, terms: RewardTerms) -> np.ndarray:
        over_B = (terms.flops - terms.budget) / terms.budget
        bins_B = np.clip((terms.budget * len(self.prices_K)).astype(int), 0, len(self.prices_K) - 1)
        rewards_B = terms.accuracy - self.prices_K[bins_B] * over_B
        for number in np.unique(bins_B):
            step = self.rate * float(over_B[bins_B == number].mean())
            self.prices_K[number] = max(0.0, self.prices_K[number] + step)
        return rewards_B

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps; JSON data."""
        return {"prices": self.prices_K.tolist()}

    def load_state(self, state: dict[str, Any]) -> None:
        self.prices_K = np.asarray(state["prices"], dtype=np.float64)
