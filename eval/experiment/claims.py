"""What each experiment is asked, answered from its figures in plain words."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations, pairwise

from eval.experiment.arms import ESTIMATORS, Arm
from eval.experiment.statistics import Comparison
from eval.experiment.summary import ArmResult, area_of

OURS = {
    "pruning": tuple(f"{estimator} tokens" for estimator in ESTIMATORS),
    "dimensions": ("rl",),
    "training": ESTIMATORS,
}
"""What each experiment holds against the rest."""


def pairs(experiment: str, arms: Sequence[Arm]) -> list[tuple[str, str]]:
    """The comparisons that an experiment is about."""
    ours = OURS[experiment]
    rivals = [arm.name for arm in arms if arm.name != "full" and arm.name not in ours]
    found = [(first, second) for first in ours for second in rivals]
    if experiment == "dimensions":
        found += [("rl heads and layers", second) for second in ("rl heads", "rl layers")]
    if experiment == "training":
        found += list(combinations(ours, 2))
    return found


def claims(
    experiment: str, results: dict[str, ArmResult], found: Sequence[Comparison], budgets: Sequence[float]
) -> list[str]:
    """Sentences, each with its figures."""
    asked = [(first, budget) for first in OURS[experiment] for budget in (*budgets, None)]
    hardest = [_hardest(first, found, budget) for first, budget in asked]
    # of two that are each other's best rival, the first speaks
    once = {frozenset((each.first, each.second, each.budget)): each for each in reversed(hardest) if each is not None}
    sentences = [_against(each, results, budgets) for each in reversed(once.values())]
    full = results.get("full")
    if experiment == "training" and full is not None and full.records:
        sentences = [*_kept_of_full(results, budgets), *sentences]
    for name, result in results.items():
        falls = _falls(result, budgets)
        if falls:
            sentences.append(f"{name}: accuracy falls by more than a standard error from budget {falls}.")
    return sentences


def _hardest(first: str, found: Sequence[Comparison], budget: float | None) -> Comparison | None:
    """One arm against the best of its rivals at a budget, or in area."""
    own = (each if each.first == first else each.mirrored for each in found if first in (each.first, each.second))
    return min((each for each in own if each.budget == budget), key=lambda each: each.difference.value, default=None)


def _against(each: Comparison, results: dict[str, ArmResult], budgets: Sequence[float]) -> str:
    words = {"above": "is above", "below": "is below", "no difference shown": "is not shown to differ from"}
    names = (each.first, each.second)
    if each.budget is None:
        met = [budget for budget in budgets if all(budget in results[name].records for name in names)]
        ours, theirs = (100 * area_of(results[name], met) for name in names)
        where = "Over all budgets (area under the curve)"
    else:
        ours, theirs = (100 * results[name].mean(each.budget, "accuracy") for name in names)
        where = f"At {100 * each.budget:g} % of the LLM FLOPs"
    difference = each.difference
    return (
        f"{where} {each.first} ({ours:.1f} %) {words[each.verdict]} its best rival, {each.second} ({theirs:.1f} %): "
        f"{100 * difference.value:+.2f} points [{100 * difference.low:+.2f}, {100 * difference.high:+.2f}], "
        f"p = {each.p:.1g}."
    )


def _kept_of_full(results: dict[str, ArmResult], budgets: Sequence[float]) -> list[str]:
    (full,) = results["full"].records.values()
    whole = full[0]["accuracy"]
    if not whole:
        return ["The full model answers nothing right, so nothing can be kept."]
    sentences = []
    for budget in budgets:
        kept = [
            f"{name} keeps {100 * results[name].mean(budget, 'accuracy') / whole:.1f} %"
            for name in ESTIMATORS
            if name in results and budget in results[name].records
        ]
        if kept:
            sentences.append(f"At {100 * budget:g} % of the LLM FLOPs {', '.join(kept)} of full accuracy.")
    return sentences


def _falls(result: ArmResult, budgets: Sequence[float]) -> str | None:
    """Where more budget gives clearly less accuracy."""
    met = [budget for budget in sorted(budgets) if budget in result.records] if result.records else []
    for less, more in pairwise(met):
        error = max(result.mean(less, "accuracy_stderr"), result.mean(more, "accuracy_stderr"))
        if result.mean(less, "accuracy") - result.mean(more, "accuracy") > error:
            return f"{less:g} to {more:g}"
    return None
