"""What an experiment found: its results, arm by arm, and tables of them.

Shape legend: R seeds, K kinds of questions, Q queries.
"""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from backbones.errors import InputError
from eval.evaluate import Record
from eval.experiment.arms import FULL
from eval.experiment.cells import Cell
from eval.experiment.statistics import (
    Comparison,
    Estimate,
    area_under_curve,
    compare,
    hypervolume,
    interquartile_mean,
    mean_over_seeds,
    show_p,
    standard_error,
)
from eval.report import markdown
from eval.runs import RunFolder

NOT_YET = "not measured yet"

MOST_LOST = 0.01
"""A training has converged when validation accuracy stays within so much of its end."""


@dataclass(frozen=True)
class Convergence:
    """How soon a run was as good as it became.

    Attributes:
        queries: answered until then.
        seconds: of training until then.
        final: mean validation accuracy over the budgets at the end.
    """

    queries: int
    seconds: float
    final: float


@dataclass(frozen=True)
class Table:
    """A table of the report.

    Attributes:
        title: what it shows.
        rows: cells, the first row its head.
        note: what it allows one to conclude, and what not.
    """

    title: str
    rows: list[list[str]]
    note: str

    @property
    def name(self) -> str:
        """Of its file, and in trackers."""
        return self.title.split()[0].lower()

    def markdown(self) -> str:
        return f"### {self.title}\n\n{markdown(self.rows)}\n\n{self.note}\n"

    def csv(self) -> str:
        text = io.StringIO()
        csv.writer(text).writerows(self.rows)
        return text.getvalue()


@dataclass
class ArmResult:
    """What one arm did over its seeds.

    Attributes:
        name: of the arm.
        cells: that could be measured.
        failures: why others could not, by seed.
        records: by budget, a record a seed.
        gaps: by budget, why it cannot be met.
        outcomes: of each cell, its ``outcomes()``.
    """

    name: str
    cells: list[Cell] = field(default_factory=list)
    failures: dict[int, str] = field(default_factory=dict)
    records: dict[float, list[Record]] = field(default_factory=dict)
    gaps: dict[float, str] = field(default_factory=dict)
    outcomes: list[dict[str, np.ndarray]] = field(default_factory=list)

    @property
    def budgeted(self) -> bool:
        return all(record["budgeted"] for own in self.records.values() for record in own)

    def mean(self, budget: float, field: str) -> float:
        return float(np.mean([record[field] for record in self.records[budget]]))

    def scores(self, budget: float) -> np.ndarray:
        """(R, Q) accuracy of each seed on each query."""
        column = f"accuracy@{budget:g}"
        return np.stack([outcomes[column] for outcomes in self.outcomes if column in outcomes])

    def met(self, budgets: Sequence[float]) -> list[float]:
        """Those of the budgets that it can meet."""
        return [budget for budget in budgets if budget in self.records]


def collect(cells: Sequence[Cell]) -> dict[str, ArmResult]:
    """By arm, what its cells hold.

    Raises:
        InputError: an unreadable file, or a cell of another number of test queries than the first.
    """
    results: dict[str, ArmResult] = {}
    sizes: dict[int, Cell] = {}
    for cell in cells:
        result = results.setdefault(cell.arm.name, ArmResult(cell.arm.name))
        if not cell.done:
            result.failures[cell.seed] = cell.failure() or NOT_YET
            continue
        result.cells.append(cell)
        result.outcomes.append(cell.outcomes())
        for column in result.outcomes[-1].values():
            sizes.setdefault(len(column), cell)
        if len(sizes) > 1:
            one, other = sizes
            raise InputError(
                f"{str(sizes[one].folder)!r} has outcomes of {one} queries, {str(sizes[other].folder)!r} of {other}; "
                "remove the one that is of other data, to measure it again"
            )
        for record in cell.records():
            if "gap" in record:
                result.gaps[record["budget"]] = record["gap"]
            else:
                result.records.setdefault(record["budget"], []).append(record)
    return results


def ranked(results: Mapping[str, ArmResult], budgets: Sequence[float]) -> list[ArmResult]:
    """Those with records: the full model, then by area, below those that meet more budgets; last those without one."""

    def key(result: ArmResult) -> tuple[bool, bool, int, float]:
        met = result.met(budgets)
        height = area_of(result, met) if len(met) > 1 else -1.0
        return result.name == FULL.name, result.budgeted, len(met), height

    measured = [result for result in results.values() if result.records]
    return sorted(measured, key=key, reverse=True)


def gaps(results: Mapping[str, ArmResult]) -> list[tuple[str, str]]:
    """Why figures are missing, and of what: seeds, arms and budgets of one reason together."""
    seeds: dict[str, dict[str, list[str]]] = {}
    budgets: dict[str, dict[str, dict[str, list[str]]]] = {}
    for name, result in results.items():
        for why in dict.fromkeys(result.failures.values()):
            own = [str(seed) for seed, reason in result.failures.items() if reason == why]
            where = f" (seed{'s' if len(own) > 1 else ''} {', '.join(own)})" if result.cells else ""
            seeds.setdefault(why, {}).setdefault(where, []).append(name)
        for why in dict.fromkeys(map(_general, result.gaps.values())):
            at = sorted(budget for budget, reason in result.gaps.items() if _general(reason) == why)
            alike = budgets.setdefault(why, {}).setdefault(enumerated([f"{budget:g}" for budget in at]), {})
            alike.setdefault(_least(result.gaps[at[0]]), []).append(name)
    named = {why: [_named(names, where) for where, names in groups.items()] for why, groups in seeds.items()}
    for why, groups in budgets.items():
        named[why] = [
            f"at {at}, {', '.join(_named(names, least) for least, names in alike.items())}"
            for at, alike in groups.items()
        ]
    return [(why, "; ".join(parts)) for why, parts in named.items()]


def _named(names: Sequence[str], what: str) -> str:
    return ", ".join(names) + what


LEAST = re.compile(r"; the least budget here is ([\d.]+)")


def _general(why: str) -> str:
    """Why a budget cannot be met, without its figures and the policy's name."""
    why = re.sub(r"\bbudget [\d.]+ is", "the budget is", LEAST.sub("", why))
    return re.sub(r"policy ('[^']*'|\"[^\"]*\")", "the policy", why)


def _least(why: str) -> str:
    found = LEAST.search(why)
    return f" (possible from {found[1].rstrip('.')})" if found else ""


def enumerated(words: Sequence[str]) -> str:
    """``a``, ``a and b``, ``a, b and c``."""
    return " and ".join(filter(None, (", ".join(words[:-1]), *words[-1:])))


def estimates(
    results: Mapping[str, ArmResult], kinds: Sequence[str] | None
) -> dict[tuple[str, float], tuple[Estimate, Estimate]]:
    """By arm and budget, mean and interquartile mean of accuracy over seeds and kinds, with 95 % intervals."""
    scores = {
        (name, budget): by_kind(result.scores(budget), kinds)
        for name, result in results.items()
        for budget in result.records
    }
    return {key: (mean_over_seeds(own_RK), interquartile_mean(own_RK)) for key, own_RK in scores.items()}


def by_kind(scores_RQ: np.ndarray, kinds: Sequence[str] | None) -> np.ndarray:
    """(R, K) mean accuracy of each seed on each kind of question."""
    if kinds is None or len(kinds) != scores_RQ.shape[1]:
        return scores_RQ.mean(1, keepdims=True)
    column = np.array(kinds)
    return np.stack([scores_RQ[:, column == kind].mean(1) for kind in sorted(set(kinds))], axis=1)


def accuracy_table(
    results: Mapping[str, ArmResult],
    found: Mapping[tuple[str, float], tuple[Estimate, Estimate]],
    budgets: Sequence[float],
) -> Table:
    """Accuracy at each budget, its area and the spread of that, hypervolume, what is spent of what is asked."""
    head = ["policy", "seeds", "area", "spread", *(f"at {budget:g}" for budget in budgets)]
    rows = [[*head, "hypervolume", "spent / asked", "over budget"]]
    for result in ranked(results, budgets):
        name, seeds = result.name, str(len(result.cells))
        if not result.budgeted:
            ((budget, _),) = result.records.items()
            cost = f"{100 * result.mean(budget, 'llm_flops_ratio'):.1f} % of LLM FLOPs"
            own = f"{show(found[name, budget][0])} at its own cost"
            rows.append([name, seeds, "", "", own, *[""] * (len(budgets) - 1), "", cost, ""])
            continue
        cells = [show(found[name, budget][0]) if budget in result.records else "—" for budget in budgets]
        met = result.met(budgets)
        area, spread = "—", ""
        if len(met) > 1:
            areas_R = np.asarray(area_under_curve(met, np.stack([result.scores(budget).mean(1) for budget in met], -1)))
            area = f"{100 * area_of(result, met):.1f}" + (f" from {met[0]:g}" if len(met) < len(budgets) else "")
            spread = f"{100 * np.std(areas_R, ddof=1):.2f}" if len(areas_R) > 1 else ""
        points = [(result.mean(at, "llm_flops_ratio"), result.mean(at, "accuracy")) for at in result.records]
        asked = [result.mean(budget, "llm_flops_ratio") / budget for budget in met]
        over = sum(record["budget_violations"] for own in result.records.values() for record in own)
        measured = [f"{100 * hypervolume(points):.1f}", f"{np.mean(asked):.2f}", str(over)]
        rows.append([name, seeds, area, spread, *cells, *measured])
    for name, result in results.items():
        if not result.records and any(why != NOT_YET for why in result.failures.values()):
            rows.append([name, "0", "", "", *["failed"] * len(budgets), "", "", ""])
    note = (
        "Accuracy in %, mean over seeds and kinds of questions (each kind counts alike), with a 95 % "
        "stratified-bootstrap interval over seeds; one seed gives no interval. Area: mean accuracy over the budgets, "
        "each query counting alike; spread: its standard deviation over seeds, in points. Hypervolume: the area, in %, "
        "that the points of a policy dominate, from cost 0 to 1. A dash is a budget that cannot be met; an area from a "
        "budget on compares with such areas alone. Where two intervals do not meet, other seeds would most likely give "
        "the same order; they are of trainings, on one test split of one data set, and say nothing of other data or "
        "backbones."
    )
    return Table("Accuracy", rows, note)


def middle_table(
    results: Mapping[str, ArmResult],
    found: Mapping[tuple[str, float], tuple[Estimate, Estimate]],
    budgets: Sequence[float],
) -> Table:
    """Interquartile means."""
    rows = [["policy", *(f"at {budget:g}" for budget in budgets)]]
    for result in ranked(results, budgets):
        if result.budgeted and len(result.cells) > 1:
            own = [found.get((result.name, budget)) for budget in budgets]
            rows.append([result.name, *("—" if each is None else show(each[1]) for each in own)])
    note = (
        "The mean, in %, of the middle half of the accuracies by seed and kind of question, with a 95 % "
        "stratified-bootstrap interval: neither single seeds that went wrong nor the easiest and hardest kinds move "
        "it, so an order that differs from that of the means rests on these; it is no mean, and hides what they lose."
    )
    return Table("Interquartile means", rows, note)


def show(estimate: Estimate) -> str:
    """A share in per cent, with its interval if it has one."""
    value, low, high = (100 * part for part in (estimate.value, estimate.low, estimate.high))
    return f"{value:.1f}" if low == high else f"{value:.1f} [{low:.1f}, {high:.1f}]"


def area_of(result: ArmResult, budgets: Sequence[float]) -> float:
    return float(area_under_curve(budgets, [result.mean(budget, "accuracy") for budget in budgets]))


def shared_budgets(first: ArmResult, second: ArmResult, budgets: Sequence[float]) -> list[float]:
    """Those that both meet; none if one has no budget, and so its own cost at each."""
    if not (first.budgeted and second.budgeted):
        return []
    return second.met(first.met(budgets))


def comparisons(
    results: Mapping[str, ArmResult], pairs: Sequence[tuple[str, str]], budgets: Sequence[float]
) -> list[Comparison]:
    """Paired tests of arms that met the same budgets, in area and at each budget."""
    tests: list[tuple[str, str, float | None, np.ndarray, np.ndarray]] = []
    for first, second in pairs:
        ours, theirs = results.get(first), results.get(second)
        if ours is None or theirs is None:
            continue
        both = shared_budgets(ours, theirs, budgets)
        scores = {budget: (ours.scores(budget).mean(0), theirs.scores(budget).mean(0)) for budget in both}
        tests += [(first, second, budget, *scores[budget]) for budget in both]
        if len(both) > 1:
            areas = [area_under_curve(both, np.stack([scores[b][side] for b in both], axis=-1)) for side in (0, 1)]
            tests.append((first, second, None, np.asarray(areas[0]), np.asarray(areas[1])))
    return compare(tests)


def comparison_table(found: Sequence[Comparison]) -> Table:
    rows = [["policy", "against", "at", "difference, points", "p (Holm)", "verdict"]]
    for each in found:
        at = "area" if each.budget is None else f"{each.budget:g}"
        difference = f"{100 * each.difference.value:+.2f} [{100 * each.difference.low:+.2f}, "
        difference += f"{100 * each.difference.high:+.2f}]"
        rows.append([each.first, each.second, at, difference, show_p(each.p), each.verdict])
    areas = sum(each.budget is None for each in found)
    note = (
        "Paired t-tests on the same queries, each arm's accuracy on a query the mean over its seeds; intervals are "
        "bootstrapped over queries, and are not corrected. p is corrected (Holm) in two families: the "
        f"{areas} areas, which are the main question, and the {len(found) - areas} single budgets. They speak of these "
        "trained controllers on this data: a difference that is shown holds for other queries of its kind, not for "
        "other data; one that is not shown may be there all the same."
    )
    return Table("Paired comparisons", rows, note)


def cost_table(results: Mapping[str, ArmResult], budgets: Sequence[float]) -> Table:
    """Accuracy, what plans keep and what they cost, budget by budget."""
    every = [record for result in results.values() for own in result.records.values() for record in own]
    times = any("ttft_ms_p50" in record for record in every)
    head = ["policy", "budget", "accuracy %", "standard error", "LLM FLOPs %", "total FLOPs %"]
    rows = [[*head, "tokens", "heads", "layers"] + ["TTFT ms"] * times]
    for result in ranked(results, budgets):
        for budget in sorted(result.records):
            accuracy = [f"{100 * result.mean(budget, 'accuracy'):.2f}"]
            accuracy.append(f"{100 * standard_error(result.scores(budget)):.2f}")
            spent = [f"{100 * result.mean(budget, field):.1f}" for field in ("llm_flops_ratio", "total_flops_ratio")]
            kept = [f"{result.mean(budget, field):.1f}" for field in ("kept_tokens", "kept_heads", "kept_layers")]
            timed = [record["ttft_ms_p50"] for record in result.records[budget] if "ttft_ms_p50" in record]
            time = [f"{np.median(timed):.2f}" if timed else ""] * times
            own = f"{budget:g}" if result.budgeted else ""
            rows.append([result.name, own, *accuracy, *spent, *kept, *time])
    note = (
        "Means over queries and seeds, each query counting alike. Standard error: of that accuracy, from query to "
        "query; it says how far other queries of the same kind would move it, and nothing of other trainings. LLM "
        "FLOPs are prefill and answer of the language model with everything that choosing the plan costs; total FLOPs "
        "have the vision tower and projector too. FLOPs compare policies on any machine; they are no times."
    )
    if times:
        note += " Times are medians of single queries on the machine named below, and compare only within this table."
    return Table("Cost and accuracy, point by point", rows, note)


def validations(cell: Cell) -> list[tuple[int, float, float]]:
    """Queries, seconds, and mean accuracy over the budgets, at each validation of a cell's training, if it had one."""
    folder = RunFolder(cell.run)
    return [
        (line["queries"], timing["seconds"], float(np.mean([own["accuracy"] for own in line["validation"].values()])))
        for line, timing in zip(folder.metrics(), folder.timing(), strict=False)
        if "validation" in line
    ]


def convergence(cell: Cell) -> Convergence | None:
    """How soon a cell's training converged, if it had one."""
    points = validations(cell)
    if not points:
        return None
    final = points[-1][2]
    since = points[-1]
    for point in reversed(points):
        if point[2] < final - MOST_LOST:
            break
        since = point
    return Convergence(int(since[0]), float(since[1]), float(final))


def convergence_table(results: Mapping[str, ArmResult], budgets: Sequence[float]) -> Table:
    rows = [
        ["policy", "seeds", "queries to converge", "seconds to converge", "final validation %", "spread over seeds"]
    ]
    for result in ranked(results, budgets):
        found = [each for each in map(convergence, result.cells) if each is not None]
        if not found:
            continue
        finals = [100 * each.final for each in found]
        spread = f"{np.std(finals, ddof=1):.2f}" if len(finals) > 1 else ""
        queries, seconds = np.median([each.queries for each in found]), np.median([each.seconds for each in found])
        soon = [f"{queries:,.0f}", f"{seconds:.0f}"]
        rows.append([result.name, str(len(found)), *soon, f"{np.mean(finals):.1f}", spread])
    note = (
        "Converged: from then on mean validation accuracy over the budgets stays within "
        f"{100 * MOST_LOST:g} point of its end. Medians over seeds; seconds of training alone. Spread: standard "
        "deviation of the final accuracy, in points. Queries compare trainings on any machine, seconds only those that "
        "had this one for themselves; validations are some thousand queries apart, so nothing finer can be told."
    )
    return Table("Convergence and stability", rows, note)
