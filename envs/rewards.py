"""Rewards: plain functions from the raw terms of a batch to one number a row; ``envs.reward_spec`` takes their names.

Your own needs no change here: write the function, name its path. One that remembers gives ``state()`` and takes
``load_state()``, JSON data, so that stopped runs continue exactly.

Shape legend: B rows, K bins of budgets.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

import numpy as np


@dataclass(frozen=True)
class RewardTerms:
    """What is known about B answered queries; every field is (B,) float64.

    Attributes:
        accuracy: score of the answer, in [0, 1].
        log_likelihood: log-probability of the accepted answer under the plan, at most 0.
        flops: share of the full plan's LLM FLOPs that the plan spends, controller included.
        budget: the share that it may spend.
        kept_tokens: visual tokens kept.
        kept_heads: head slots computed, over all layers.
        kept_layers: layers run.
        latency: share of the full plan's prefill time that the plan is predicted to take; None without a latency model.
    """

    accuracy: np.ndarray
    log_likelihood: np.ndarray
    flops: np.ndarray
    budget: np.ndarray
    kept_tokens: np.ndarray
    kept_heads: np.ndarray
    kept_layers: np.ndarray
    latency: np.ndarray | None = None

    def __post_init__(self) -> None:
        """What one reward reads is what the next one reads: the arrays cannot be written to."""
        for name, values in self.as_dict().items():
            seen = values.view()
            seen.flags.writeable = False
            object.__setattr__(self, name, seen)

    def __len__(self) -> int:
        return len(self.accuracy)

    def as_dict(self) -> dict[str, np.ndarray]:
        """The terms that are known, by name."""
        known = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: values for name, values in known.items() if values is not None}


Reward = Callable[[RewardTerms], np.ndarray]


def accuracy(terms: RewardTerms) -> np.ndarray:
    """The answer's score."""
    return terms.accuracy


def log_likelihood(terms: RewardTerms) -> np.ndarray:
    """Log-probability of the accepted answer, a dense signal where accuracy is 0 or 1; floored at -5."""
    return np.maximum(terms.log_likelihood, -5.0)


def soft_accuracy(terms: RewardTerms) -> np.ndarray:
    """Probability of the accepted answer against all else at temperature 2, in [0, 1]: accuracy with its step made
    smooth, so that every plan is told apart from the next, and nearly sure or nearly lost answers still count."""
    odds = terms.log_likelihood - np.log(-np.expm1(np.minimum(terms.log_likelihood, -1e-7)))
    return 1 / (1 + np.exp(-odds / 2))


def flops(terms: RewardTerms) -> np.ndarray:
    """Share of the full plan's LLM FLOPs spent: a cost, so give it a negative weight."""
    return terms.flops


def overspend(terms: RewardTerms) -> np.ndarray:
    """How far the plan is over its budget, relative to it; 0 within. A cost, so give it a negative weight."""
    return np.maximum(terms.flops - terms.budget, 0.0) / terms.budget


def latency(terms: RewardTerms) -> np.ndarray:
    """Predicted share of the full plan's prefill time: a cost, so give it a negative weight. Needs a latency model."""
    if terms.latency is None:
        raise ValueError("there is no latency model; calibrate one with `python -m maskgym.eval latency --out FILE`")
    return terms.latency


def accuracy_flops(terms: RewardTerms) -> np.ndarray:
    """Accuracy minus 0.02 x the share of FLOPs spent: half the FLOPs are worth one point of accuracy."""
    return terms.accuracy - 0.02 * terms.flops


def budget_hinge(terms: RewardTerms) -> np.ndarray:
    """Accuracy minus 2 x the relative overspend: within its budget a plan costs nothing."""
    return terms.accuracy - 2.0 * overspend(terms)


class Lagrangian:
    """A price of FLOPs that finds itself: dual ascent on the budget, bin by bin of budgets.

    Accuracy minus a price times the relative overspend, the price of each budget bin rising while its plans spend
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


REWARDS: dict[str, Reward] = {
    "accuracy": accuracy,
    "accuracy-flops": accuracy_flops,
    "budget-hinge": budget_hinge,
    "flops": flops,
    "latency": latency,
    "log-likelihood": log_likelihood,
    "overspend": overspend,
    "soft-accuracy": soft_accuracy,
}

ADAPTIVE: dict[str, Callable[[], Reward]] = {"lagrangian": Lagrangian}
"""Rewards that change with what they see; each use gets one of its own."""
