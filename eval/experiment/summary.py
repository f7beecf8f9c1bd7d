"""What an experiment found: tables, comparisons, claims.

Shape legend: R seeds, K kinds of questions, Q queries.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from eval.evaluate import Record
from eval.experiment.cells import Cell
from eval.experiment.statistics import (
    Comparison,
    Estimate,
    area_under_curve,
    compare,
    hypervolume,
    interquartile_mean,
    mean_over_seeds,
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
    """

    name: str
    cells: list[Cell] = field(default_factory=list)
    failures: dict[int, str] = field(default_factory=dict)
    records: dict[float, list[Record]] = field(default_factory=dict)
    gaps: dict[float, str] = field(default_factory=dict)

    @property
    def budgeted(self) -> bool:
        return all(record["budgeted"] for own in self.records.values() for record in own)

    def mean(self, budget: float, field: str) -> float:
        return float(np.mean([record[field] for record in self.records[budget]]))

    def scores(self, budget: float) -> np.ndarray:
        """(R, Q) accuracy of each seed on each query."""
        return np.stack([cell.outcomes()[f"accuracy@{budget:g}"] for cell in self.cells])

    def meets(self, budgets: Sequence[float]) -> bool:
        return all(budget in self.records for budget in budgets)

    def missing(self) -> list[tuple[str, str]]:
        """What has no figures, and why; seeds of one reason together."""
        reasons = dict.fromkeys(self.failures.values())
        found = []
        for why in reasons:
            seeds = [str(seed) for seed, own in self.failures.items() if own == why]
            found.append((f"{self.name}, seed{'s' if len(seeds) > 1 else ''} {', '.join(seeds)}", why))
        return found + [(f"{self.name} at {budget:g}", why) for budget, why in self.gaps.items()]


def collect(cells: Sequence[Cell]) -> dict[str, ArmResult]:
    """By arm, what its cells hold."""
    results: dict[str, ArmResult] = {}
    for cell in cells:
        result = results.setdefault(cell.arm.name, ArmResult(cell.arm.name))
        if not cell.done:
            result.failures[cell.seed] = cell.failure() or NOT_YET
            continue
        result.cells.append(cell)
        for record in cell.records():
            if "gap" in record:
                result.gaps[record["budget"]] = record["gap"]
            else:
                result.records.setdefault(record["budget"], []).append(record)
    return results


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
    """Accuracy at each budget, its area, and what is spent of what is asked."""
    rows = [["policy", "seeds", *(f"at {budget:g}" for budget in budgets), "area", "spent / asked", "over budget"]]
    for name, result in results.items():
        if not result.records:
            if any(why != NOT_YET for why in result.failures.values()):
                rows.append([name, "0", *["failed"] * len(budgets), "", "", ""])
            continue
        seeds = str(len(result.cells))
        if not result.budgeted:
            (budget,) = result.records
            cost = f"{100 * result.mean(budget, 'llm_flops_ratio'):.1f} % of LLM FLOPs"
            rows.append([name, seeds, *[""] * (len(budgets) - 1), show(found[name, budget][0]), "", cost, ""])
            continue
        cells = [show(found[name, budget][0]) if budget in result.records else "—" for budget in budgets]
        area = f"{100 * area_of(result, budgets):.1f}" if result.meets(budgets) else "—"
        asked = [result.mean(budget, "llm_flops_ratio") / budget for budget in budgets if budget in result.records]
        over = sum(record["budget_violations"] for own in result.records.values() for record in own)
        rows.append([name, seeds, *cells, area, f"{np.mean(asked):.2f}", str(over)])
    note = (
        "Accuracy in %, mean over seeds and kinds of questions (each kind counts alike), with a 95 % "
        "stratified-bootstrap interval over seeds; one seed gives no interval. Area: mean accuracy over the budgets. "
        "An interval is over trainings, on one test split of one data set: it says nothing of other data or backbones. "
        "A dash is a budget that cannot be met."
    )
    return Table("Accuracy", rows, note)


def middle_table(
    results: Mapping[str, ArmResult],
    found: Mapping[tuple[str, float], tuple[Estimate, Estimate]],
    budgets: Sequence[float],
) -> Table:
    """Interquartile means."""
    rows = [["policy", *(f"at {budget:g}" for budget in budgets)]]
    for name, result in results.items():
        if result.records and result.budgeted and len(result.cells) > 1:
            rows.append(
                [name, *(show(found[name, budget][1]) if budget in result.records else "—" for budget in budgets)]
            )
    note = (
        "The mean, in %, of the middle half of the accuracies by seed and kind of question, with a 95 % "
        "stratified-bootstrap interval: neither single seeds that went wrong nor the easiest and hardest kinds move it."
    )
    return Table("Interquartile means", rows, note)


def show(estimate: Estimate) -> str:
    """A share in per cent, with its interval if it has one."""
    value, low, high = (100 * part for part in (estimate.value, estimate.low, estimate.high))
    return f"{value:.1f}" if low == high else f"{value:.1f} [{low:.1f}, {high:.1f}]"


def area_of(result: ArmResult, budgets: Sequence[float]) -> float:
    return float(area_under_curve(budgets, [result.mean(budget, "accuracy") for budget in budgets]))


def comparisons(
    results: dict[str, ArmResult], pairs: Sequence[tuple[str, str]], budgets: Sequence[float]
) -> list[Comparison]:
    """Paired tests of arms that met the same budgets, at each budget and in area, corrected together."""
    tests: list[tuple[str, str, float | None, np.ndarray, np.ndarray]] = []
    for first, second in pairs:
        ours, theirs = results.get(first), results.get(second)
        if ours is None or theirs is None:
            continue
        both = [budget for budget in budgets if budget in ours.records and budget in theirs.records]
        scores = {budget: (ours.scores(budget).mean(0), theirs.scores(budget).mean(0)) for budget in both}
        tests += [(first, second, budget, *scores[budget]) for budget in both]
        if len(both) > 1:
            areas = [area_under_curve(both, np.stack([scores[b][side] for b in both], axis=-1)) for side in (0, 1)]
            tests.append((first, second, None, np.asarray(areas[0]), np.asarray(areas[1])))
    return compare(tests)


def comparison_table(found: Sequence[Comparison]) -> Table:
    rows = [["", "against", "at", "difference, points", "p (Holm)", "verdict"]]
    for each in found:
        at = "area" if each.budget is None else f"{each.budget:g}"
        difference = f"{100 * each.difference.value:+.2f} [{100 * each.difference.low:+.2f}, "
        difference += f"{100 * each.difference.high:+.2f}]"
        rows.append([each.first, each.second, at, difference, f"{each.p:.1g}", each.verdict])
    note = (
        "Paired t-tests on the same queries, each arm's accuracy on a query the mean over its seeds, corrected for "
        "their number; intervals are bootstrapped over queries. They speak of these trained controllers on this data."
    )
    return Table("Paired comparisons", rows, note)


def cost_table(results: dict[str, ArmResult]) -> Table:
    """What plans keep and cost, budget by budget."""
    times = any(
        "ttft_ms_p50" in record for result in results.values() for own in result.records.values() for record in own
    )
    head = ["policy", "budget", "LLM FLOPs %", "total FLOPs %", "tokens", "heads", "layers", "hypervolume"]
    rows = [head + ["TTFT ms"] * times]
    for name, result in results.items():
        points = [
            (result.mean(budget, "llm_flops_ratio"), result.mean(budget, "accuracy")) for budget in result.records
        ]
        for place, budget in enumerate(sorted(result.records)):
            spent = [f"{100 * result.mean(budget, field):.1f}" for field in ("llm_flops_ratio", "total_flops_ratio")]
            kept = [f"{result.mean(budget, field):.1f}" for field in ("kept_tokens", "kept_heads", "kept_layers")]
            volume = f"{100 * hypervolume(points):.1f}" if place == 0 else ""
            timed = [record["ttft_ms_p50"] for record in result.records[budget] if "ttft_ms_p50" in record]
            time = [f"{np.median(timed):.2f}" if timed else ""] * times
            rows.append([name, f"{budget:g}" if result.budgeted else "", *spent, *kept, volume, *time])
    note = (
        "Means over queries and seeds. LLM FLOPs are prefill and answer of the language model with everything that "
        "choosing the plan costs; total FLOPs have the vision tower and projector too. Hypervolume: the area, in %, "
        "that the points of a policy dominate. Times are medians of single queries on the machine that is named below, "
        "and compare only within this table."
    )
    return Table("Cost", rows, note)


def convergence(cell: Cell) -> Convergence | None:
    """How soon a cell's training converged, if it had one."""
    folder = RunFolder(cell.run)
    lines = [(line, timing) for line, timing in zip(folder.metrics(), folder.timing(), strict=False)]
    points = [
        (line["queries"], timing["seconds"], np.mean([each["accuracy"] for each in line["validation"].values()]))
        for line, timing in lines
        if "validation" in line
    ]
    if not points:
        return None
    final = points[-1][2]
    since = points[-1]
    for point in reversed(points):
        if point[2] < final - MOST_LOST:
            break
        since = point
    return Convergence(int(since[0]), float(since[1]), float(final))


def convergence_table(results: dict[str, ArmResult]) -> Table:
    rows = [
        ["policy", "seeds", "queries to converge", "seconds to converge", "final validation %", "spread over seeds"]
    ]
    for name, result in results.items():
        found = [each for each in map(convergence, result.cells) if each is not None]
        if not found:
            continue
        finals = [100 * each.final for each in found]
        spread = f"{np.std(finals, ddof=1):.2f}" if len(finals) > 1 else ""
        queries, seconds = np.median([each.queries for each in found]), np.median([each.seconds for each in found])
        rows.append([name, str(len(found)), f"{queries:,.0f}", f"{seconds:.0f}", f"{np.mean(finals):.1f}", spread])
    note = (
        "Converged: from then on mean validation accuracy over the budgets stays within "
        f"{100 * MOST_LOST:g} point of its end. Medians over seeds; seconds of training alone. Spread: standard "
        "deviation of the final accuracy, in points. Validations are some thousand queries apart, so nothing finer can "
        "be told."
    )
    return Table("Convergence and stability", rows, note)
