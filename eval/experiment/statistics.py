"""What measured accuracies allow one to say: intervals over seeds, tests over trainings and queries together, areas.

Intervals over seeds are stratified-bootstrap intervals, as Agarwal et al. (NeurIPS 2021) advise for few runs; tests
compare two arms on the same queries, as if trainings and images were drawn anew, and are corrected for their number
(Holm), areas apart from single budgets.

Shape legend: R seeds, K kinds of questions, Q queries.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.integrate import trapezoid
from scipy.stats import bootstrap, t, trim_mean
from statsmodels.stats.multitest import multipletests

RESAMPLES = 2000


@dataclass(frozen=True)
class Estimate:
    """A figure with its 95 % interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Pair:
    """Two arms to compare.

    Attributes:
        first, second: their names.
        budget: at which; None: area under the curve.
        first_RQ, second_RQ: accuracies of each of their seeds on the same queries.
        single: whether an arm that differs from seed to seed has one alone.
    """

    first: str
    second: str
    budget: float | None
    first_RQ: np.ndarray
    second_RQ: np.ndarray
    single: bool = False


@dataclass(frozen=True)
class Comparison:
    """One arm against another on the same queries.

    Attributes:
        first, second, budget, single: as of the pair.
        difference: mean accuracy of the first less that of the second, with an interval over trainings and queries.
        p: of the test, corrected.
    """

    first: str
    second: str
    budget: float | None
    difference: Estimate
    p: float
    single: bool = False

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


def compare(pairs: Sequence[Pair], images_Q: np.ndarray | None = None) -> list[Comparison]:
    """Tests, corrected in two families: areas are the main question, single budgets a closer look.

    Args:
        pairs: what to compare.
        images_Q: the number of the image that each query shows; None: each its own.

    Returns:
        the areas, then the single budgets.
    """
    areas = [pair for pair in pairs if pair.budget is None]
    return _family(areas, images_Q) + _family([pair for pair in pairs if pair.budget is not None], images_Q)


def _family(pairs: Sequence[Pair], images_Q: np.ndarray | None) -> list[Comparison]:
    """Tests that are corrected together."""
    if not pairs:
        return []
    found = [difference(pair.first_RQ, pair.second_RQ, images_Q) for pair in pairs]
    corrected = multipletests([p for _, p in found], method="holm")[1]
    return [
        Comparison(pair.first, pair.second, pair.budget, estimate, float(p), pair.single)
        for pair, (estimate, _), p in zip(pairs, found, corrected, strict=True)
    ]


def difference(
    first_RQ: np.ndarray, second_RQ: np.ndarray, images_Q: np.ndarray | None = None
) -> tuple[Estimate, float]:
    """Mean of the first less that of the second, with a 95 % interval, and the p of there being none.

    Trainings and images are drawn independently, so the variances that they give to the difference add up: that of each
    arm's mean over its seeds, and that of the mean over images of the paired differences. What is left is Student's t,
    with degrees of freedom by Welch and Satterthwaite. An arm with one seed adds no variance of trainings.
    """
    first_RQ, second_RQ = first_RQ.astype(np.float64), second_RQ.astype(np.float64)
    differences_Q = first_RQ.mean(0) - second_RQ.mean(0)
    mean = float(differences_Q.mean())
    terms = [_variance_over_images(differences_Q, images_Q)]
    for means_R in (first_RQ.mean(1), second_RQ.mean(1)):
        if len(means_R) > 1:
            terms.append((means_R.var(ddof=1) / len(means_R), len(means_R) - 1))
    whole = sum(variance for variance, _ in terms)
    if whole < 1e-30:  # nothing varies, but for rounding
        return Estimate(mean, mean, mean), 1.0 if mean == 0 else 0.0
    freedom = whole**2 / sum(variance**2 / own for variance, own in terms)
    half = float(t.isf(0.025, freedom, scale=whole**0.5))
    return Estimate(mean, mean - half, mean + half), 2 * float(t.sf(abs(mean), freedom, scale=whole**0.5))


def _variance_over_images(values_Q: np.ndarray, images_Q: np.ndarray | None) -> tuple[float, int]:
    """Of the mean, where the queries of an image come together; and its degrees of freedom."""
    deviations_Q = values_Q - values_Q.mean()
    sums = deviations_Q if images_Q is None else np.bincount(images_Q, deviations_Q)
    freedom = max(1, len(sums) - 1)
    return float((sums**2).sum()) * len(sums) / freedom / len(values_Q) ** 2, freedom


def show_p(p: float) -> str:
    """A p-value as it is printed."""
    return "< 0.0001" if p < 0.0001 else f"{p:.2g}"


def standard_error(scores_RQ: np.ndarray) -> float:
    """Of the mean over seeds, from query to query: how far another test set of this size would move it."""
    means_Q = scores_RQ.mean(0)
    return float(means_Q.std(ddof=1) / len(means_Q) ** 0.5) if len(means_Q) > 1 else 0.0


def area_under_curve(budgets: Sequence[float], accuracies: Sequence[float] | np.ndarray) -> float | np.ndarray:
    """Mean accuracy over the range of budgets, linear in the budget, by trapezoids; accuracies (…, budgets)."""
    return trapezoid(accuracies, budgets) / (max(budgets) - min(budgets))


def area_weights(budgets: Sequence[float]) -> np.ndarray:
    """(budgets,) what each counts for in the area; they add up to 1."""
    return np.asarray(area_under_curve(budgets, np.eye(len(budgets))))


def hypervolume(points: Sequence[tuple[float, float]]) -> float:
    """Area that (cost share, accuracy) points dominate, of the unit square: at each cost the best accuracy so far."""
    ordered = sorted((cost, accuracy) for cost, accuracy in points if cost <= 1)
    area, best, since = 0.0, 0.0, 0.0
    for cost, accuracy in ordered:
        area += best * (cost - since)
        best, since = max(best, accuracy), cost
    return area + best * (1 - since)
