"""What measured accuracies allow one to say: intervals over seeds, paired tests on the same queries, areas.

Intervals over seeds are stratified-bootstrap intervals, as Agarwal et al. (NeurIPS 2021) advise for few runs; tests
compare two arms query by query and are corrected for their number (Holm), areas apart from single budgets.

Shape legend: R seeds, K kinds of questions, Q queries.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.integrate import trapezoid
from scipy.stats import bootstrap, trim_mean, ttest_rel
from statsmodels.stats.multitest import multipletests

RESAMPLES = 2000


@dataclass(frozen=True)
class Estimate:
    """A figure with its 95 % interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Comparison:
    """One arm against another on the same queries.

    Attributes:
        first, second: their names.
        budget: at which; None: area under the curve.
        difference: mean accuracy of the first less that of the second, with an interval over queries.
        p: of the paired test, corrected.
    """

    first: str
    second: str
    budget: float | None
    difference: Estimate
    p: float

    @property
    def verdict(self) -> str:
        """What may be concluded."""
        if self.p >= 0.05 or self.difference.low <= 0 <= self.difference.high:
            return "no difference shown"
        return "above" if self.difference.value > 0 else "below"


def mean_over_seeds(scores_RK: np.ndarray, seed: int = 0) -> Estimate:
    """Mean accuracy with a 95 % stratified-bootstrap interval: seeds are drawn anew for each kind of question.

    Args:
        scores_RK: accuracy by seed and kind.
        seed: of the bootstrap.
    """
    return _stratified(scores_RK, np.mean, seed)


def interquartile_mean(scores_RK: np.ndarray, seed: int = 0) -> Estimate:
    """The mean of the middle half of the scores, likewise: what single bad or lucky seeds do not move."""
    return _stratified(scores_RK, lambda scores, axis: trim_mean(scores, 0.25, axis=axis), seed)


def _stratified(scores_RK: np.ndarray, statistic: Callable[..., Any], seed: int) -> Estimate:
    value = float(statistic(scores_RK.flatten(), axis=-1))
    if len(scores_RK) == 1 or np.ptp(scores_RK, axis=0).max() == 0:
        return Estimate(value, value, value)

    def of_strata(*strata: np.ndarray, axis: int) -> Any:
        return statistic(np.concatenate(strata, axis=axis), axis=axis)

    columns = tuple(scores_RK.T)
    interval = bootstrap(
        columns, of_strata, n_resamples=RESAMPLES, method="percentile", rng=np.random.default_rng(seed)
    ).confidence_interval
    return Estimate(value, float(interval.low), float(interval.high))


def compare(pairs: Sequence[tuple[str, str, float | None, np.ndarray, np.ndarray]]) -> list[Comparison]:
    """Paired tests, corrected in two families: areas are the main question, single budgets a closer look.

    Args:
        pairs: names of both, the budget (None: area), and the accuracies (Q,) of both on the same queries, each the
            mean over seeds.

    Returns:
        the areas, then the single budgets.
    """
    areas = [pair for pair in pairs if pair[2] is None]
    return _family(areas) + _family([pair for pair in pairs if pair[2] is not None])


def _family(pairs: Sequence[tuple[str, str, float | None, np.ndarray, np.ndarray]]) -> list[Comparison]:
    """Paired tests that are corrected together."""
    if not pairs:
        return []
    p_values = []
    for _, _, _, first_Q, second_Q in pairs:
        same = np.array_equal(first_Q, second_Q)
        p_values.append(1.0 if same else float(ttest_rel(first_Q, second_Q).pvalue))
    corrected = multipletests(p_values, method="holm")[1]
    return [
        Comparison(first, second, budget, paired_difference(first_Q, second_Q), float(p))
        for (first, second, budget, first_Q, second_Q), p in zip(pairs, corrected, strict=True)
    ]


def show_p(p: float) -> str:
    """A p-value as it is printed."""
    return "< 0.0001" if p < 0.0001 else f"{p:.2g}"


def standard_error(scores_RQ: np.ndarray) -> float:
    """Of the mean over seeds, from query to query: how far another test set of this size would move it."""
    means_Q = scores_RQ.mean(0)
    return float(means_Q.std(ddof=1) / len(means_Q) ** 0.5) if len(means_Q) > 1 else 0.0


def paired_difference(first_Q: np.ndarray, second_Q: np.ndarray, seed: int = 0) -> Estimate:
    """Mean of the differences with a 95 % bootstrap interval over queries."""
    difference_Q = first_Q - second_Q
    mean = float(difference_Q.mean())
    if np.ptp(difference_Q) == 0:
        return Estimate(mean, mean, mean)
    interval = bootstrap(
        (difference_Q,), np.mean, n_resamples=RESAMPLES, method="percentile", batch=50, rng=np.random.default_rng(seed)
    ).confidence_interval
    return Estimate(mean, float(interval.low), float(interval.high))


def area_under_curve(budgets: Sequence[float], accuracies: Sequence[float] | np.ndarray) -> float | np.ndarray:
    """Mean accuracy over a range of budgets, by trapezoids; accuracies (…, budgets)."""
    return trapezoid(accuracies, budgets) / (max(budgets) - min(budgets))


def hypervolume(points: Sequence[tuple[float, float]]) -> float:
    """Area that (cost share, accuracy) points dominate, of the unit square: at each cost the best accuracy so far."""
    ordered = sorted((cost, accuracy) for cost, accuracy in points if cost <= 1)
    area, best, since = 0.0, 0.0, 0.0
    for cost, accuracy in ordered:
        area += best * (cost - since)
        best, since = max(best, accuracy), cost
    return area + best * (1 - since)
