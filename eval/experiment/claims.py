"""What each experiment is asked, answered from its figures in plain words."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations, pairwise
from pathlib import Path

import numpy as np

from maskgym.backbones.plans.masks import AXES
from maskgym.eval.experiment.arms import ADALLAVA, ESTIMATORS, FULL, STATIC_TOKENS, Prepared, untrained
from maskgym.eval.experiment.statistics import Comparison, show_p
from maskgym.eval.experiment.summary import MOST_LOST, ArmResult, area_of, enumerated, shared_budgets

HALF = 0.5
"""The share of the LLM FLOPs at which the roadmap wants to know what is kept of full accuracy."""

COMPARED = ("gumbel", "soft-topk", "rl")
"""Trainings of the whole controller, of which that is said, and how soon they converged."""


@dataclass(frozen=True)
class Question:
    """What is asked about an arm that is expected to be at least as good as its rivals.

    Attributes:
        words: the question.
        first: the arm.
        rivals: other arms; it is held against the best of them.
    """

    words: str
    first: str
    rivals: tuple[str, ...]


@dataclass(frozen=True)
class Answer:
    """What the figures say to a question.

    Attributes:
        question: in words.
        verdict: of the whole curve: ``confirmed``, ``refuted``, ``not decided by these figures`` or, where an arm was
            trained once, ``not decided by single trainings``.
        sentences: over the whole curve, and budget by budget.
    """

    question: str
    verdict: str
    sentences: tuple[str, str]

    @property
    def text(self) -> str:
        return " ".join(self.sentences)


TRAINED_BY = {"rl": "PPO", "gumbel": "Gumbel straight-through", "soft-topk": "soft top-k"}
UNTRAINED = tuple(arm.name for arm in untrained(Prepared({}, Path())) if arm is not FULL)
OF_ADALLAVA = tuple(arm.name for arm in ADALLAVA)
ONE, TWO = (tuple(f"rl {' and '.join(axes)}" for axes in combinations(AXES, count)) for count in (1, 2))

ASKED = {
    "pruning": tuple(
        Question(
            f"Is a token controller trained by {TRAINED_BY[estimator]} better than the best static rule?",
            f"{estimator} tokens",
            STATIC_TOKENS,
        )
        for estimator in ESTIMATORS
    ),
    "dimensions": (
        Question("Are tokens, heads and layers together better than the best two of them?", "rl", TWO),
        Question("Are all three together better than the best one alone?", "rl", ONE),
        *(Question(f"Are {two.removeprefix('rl ')} together better than the best one alone?", two, ONE) for two in TWO),
        Question("Are all three together better than AdaLLaVA, alone or after a token rule?", "rl", OF_ADALLAVA),
    ),
    "training": (
        Question("Is PPO better than Gumbel straight-through?", "rl", ("gumbel",)),
        Question("Is PPO better than soft top-k?", "rl", ("soft-topk",)),
        Question(
            "Is PPO better than the best of the untrained plans and of AdaLLaVA?", "rl", (*UNTRAINED, *OF_ADALLAVA)
        ),
        Question("Is PPO after Gumbel better than either alone?", "rl after gumbel", ("rl", "gumbel")),
    ),
}
"""The questions of each experiment; its paired tests are those that they need."""

VERDICTS = {"below": "refuted", "no difference shown": "not decided by these figures", "above": "confirmed"}
"""By what a comparison with the best rival says; the worst first."""

OF_ONE = "not decided by single trainings"
"""The verdict where an arm was trained once: a difference may be one of trainings, not of methods."""


def pairs(experiment: str) -> list[tuple[str, str]]:
    """The comparisons that an experiment is about."""
    return [(question.first, rival) for question in ASKED[experiment] for rival in question.rivals]


def answers(
    experiment: str, results: Mapping[str, ArmResult], found: Sequence[Comparison], budgets: Sequence[float]
) -> list[Answer]:
    """The experiment's questions answered, but for those about arms that have no figures yet."""
    answered = (_answer(question, results, found, budgets) for question in ASKED[experiment])
    return [answer for answer in answered if answer is not None]


def _answer(
    question: Question, results: Mapping[str, ArmResult], found: Sequence[Comparison], budgets: Sequence[float]
) -> Answer | None:
    own = [each for each in found if each.first == question.first and each.second in question.rivals]
    areas = [each for each in own if each.budget is None]
    if not own:
        return None
    if not areas:
        undecided = VERDICTS["no difference shown"]
        whole = f"{undecided.capitalize()}: {question.first} shares no two budgets with a rival, so there is no area."
        return Answer(question.words, undecided, (whole, _by_budget(own, own[0].second)))
    ranges = {each.second: shared_budgets(results[each.first], results[each.second], budgets) for each in areas}
    # an area over few budgets, which are the easy ones, says less than one over many
    most = max(map(len, ranges.values()))
    each = _hardest([area for area in areas if len(ranges[area.second]) == most])
    met = ranges[each.second]
    ours, theirs = (_area(results[name], met) for name in (each.first, each.second))
    where = "all budgets" if len(met) == len(budgets) else f"the budgets that both can meet, {_percent(met)},"
    words = {"above": "is above", "below": "is below", "no difference shown": "is not shown to differ from"}
    rival = f"its best rival {each.second!r}" if len(ranges) > 1 else each.second
    verdict, difference = OF_ONE if each.single else VERDICTS[each.verdict], each.difference
    p = show_p(each.p)
    whole = (
        f"{verdict.capitalize()}: over {where} {each.first} ({ours}) {words[each.verdict]} {rival} ({theirs}): "
        f"{100 * difference.value:+.2f} points, 95 % interval [{100 * difference.low:+.2f}, "
        f"{100 * difference.high:+.2f}], p {p if p.startswith('<') else f'= {p}'}."
    )
    return Answer(question.words, verdict, (whole, _by_budget(own, each.second)))


def _area(result: ArmResult, budgets: Sequence[float]) -> str:
    """Area, and over how many trainings or draws."""
    seeds = len(result.cells)
    of = f", {seeds} seed{'s' if seeds > 1 else ''}" if any(cell.arm.seeded for cell in result.cells) else ""
    return f"area {100 * area_of(result, budgets):.1f} %{of}"


def _by_budget(found: Sequence[Comparison], rival: str) -> str:
    """At which budgets a difference to the best rival there is shown; another rival than that of the area is named."""
    budgets = sorted({each.budget for each in found if each.budget is not None})
    hardest = [_hardest([each for each in found if each.budget == budget]) for budget in budgets]
    words = {"above": "it is better", "below": "it is worse", "no difference shown": "no difference is shown"}
    parts: list[str] = []
    for verdict, said in words.items():
        at = {each.budget: each.second for each in hardest if each.verdict == verdict and each.budget is not None}
        if at:
            others = [name for name in dict.fromkeys(at.values()) if name != rival]
            named = [f"at {_percent([b for b in at if at[b] == name])} the best rival is {name!r}" for name in others]
            whole = " of the LLM FLOPs" if not parts else ""
            parts.append(f"{said} at {_percent(list(at))}{whole}" + (f" ({', '.join(named)})" if named else ""))
    return f"Budget by budget, {enumerated(parts)}."


def _hardest(found: Sequence[Comparison]) -> Comparison:
    """The comparison with the rival that is hardest to beat: one that is shown to be better, if there is one."""
    return min(found, key=lambda each: (list(VERDICTS).index(each.verdict), each.difference.value))


def _percent(budgets: Sequence[float]) -> str:
    return f"{enumerated([f'{100 * budget:g}' for budget in budgets])} %"


def remarks(experiment: str, results: Mapping[str, ArmResult], budgets: Sequence[float]) -> list[str]:
    """What is kept of full accuracy at half of the FLOPs, who spends less than they may, and which curves fall where
    they should rise."""
    said = [_kept_of_full(results, budgets), _converged(results)] if experiment == "training" else []
    sentences = [sentence for sentence in said if sentence]
    for name, result in results.items():
        if result.budgeted and result.spares(budgets):
            met = result.met(budgets)
            spent = enumerated([f"{100 * result.mean(budget, 'llm_flops_ratio'):.0f}" for budget in met])
            sentences.append(f"{name} spends {spent} % of the LLM FLOPs where it may spend {_percent(met)}.")
        falls = _falls(result, budgets)
        if falls:
            sentences.append(f"{name}: accuracy falls by more than a standard error from budget {falls}.")
    return sentences


def _kept_of_full(results: Mapping[str, ArmResult], budgets: Sequence[float]) -> str | None:
    """At the budget that is nearest to half."""
    budget = min(budgets, key=lambda budget: abs(budget - HALF))
    full = results.get(FULL.name)
    names = [name for name in COMPARED if name in results and budget in results[name].records]
    if full is None or not full.records or not names:
        return None
    (records,) = full.records.values()
    whole = records[0]["accuracy"]
    if not whole:
        return "The full model answers nothing right, so nothing can be kept."
    first, *rest = [f"{100 * results[name].mean(budget, 'accuracy') / whole:.1f} %" for name in names]
    others = [f"{name} {share}" for name, share in zip(names[1:], rest, strict=True)]
    said = f"At {100 * budget:g} % of the LLM FLOPs {names[0]} keeps {first} of full accuracy"
    return ", ".join([said, *others]) + "."


def _converged(results: Mapping[str, ArmResult]) -> str | None:
    """How soon trainings were as good as they became, medians over them."""
    queries = {
        name: np.median([each.queries for each in results[name].converged])
        for name in COMPARED
        if name in results and results[name].converged
    }
    parts = [f"{name} after {median:,.0f}" for name, median in queries.items()]
    near = f"within {100 * MOST_LOST:g} point of its end"
    return f"Queries until validation accuracy stays {near}: {', '.join(parts)}." if parts else None


def _falls(result: ArmResult, budgets: Sequence[float]) -> str | None:
    """Where more budget gives clearly less accuracy."""
    met = [budget for budget in sorted(budgets) if budget in result.records] if result.records else []
    for less, more in pairwise(met):
        error = max(result.mean(less, "accuracy_stderr"), result.mean(more, "accuracy_stderr"))
        if result.mean(less, "accuracy") - result.mean(more, "accuracy") > error:
            return f"{less:g} to {more:g}"
    return None
