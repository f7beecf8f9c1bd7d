"""What an experiment found, arm by arm: results, comparisons, convergence, and what is missing.

Shape legend: R seeds, K kinds of questions, Q queries.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

from maskgym.common.errors import InputError
from maskgym.common.run_folder import RunFolder
from maskgym.envs.data.queries import DatasetQueries
from maskgym.eval.experiment.arms import FULL
from maskgym.eval.experiment.cells import TIME, Cell
from maskgym.eval.experiment.statistics import (
    Comparison,
    Estimate,
    Pair,
    area_under_curve,
    compare,
    interquartile_mean,
    mean_over_seeds,
)
from maskgym.eval.measure.evaluate import Record

NOT_YET = "not measured yet"

SPARED = 0.1
"""Left of a budget: where it is more, tables show what is really spent."""

MOST_LOST = 0.01
"""A training has converged when validation accuracy stays within so much of its end."""


@dataclass(frozen=True)
class Convergence:
    """How soon a run was as good as it became.

    Attributes:
        queries: answered until then.
        seconds: of training until then.
        final: mean validation accuracy over the budgets at the end.
        whole: seconds of training in all.
    """

    queries: int
    seconds: float
    final: float
    whole: float


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

    @cached_property
    def curves(self) -> list[list[tuple[int, float, float]]]:
        """Of each training, its validations: queries, seconds, and mean accuracy over the budgets."""
        return [points for points in map(_validations, self.cells) if points]

    @cached_property
    def converged(self) -> list[Convergence]:
        """Of each training, how soon."""
        return [_convergence(points) for points in self.curves]

    @property
    def budgeted(self) -> bool:
        return all(record["budgeted"] for own in self.records.values() for record in own)

    @property
    def single(self) -> bool:
        """Whether it differs from seed to seed, and has one alone."""
        return len(self.cells) == 1 and self.cells[0].arm.seeded

    def spares(self, budgets: Sequence[float]) -> bool:
        """Whether it clearly spends less than it is asked to, at some budget."""
        return any(self.mean(budget, "llm_flops_ratio") < (1 - SPARED) * budget for budget in self.met(budgets))

    def mean(self, budget: float, field: str) -> float:
        """Over the seeds."""
        return float(np.mean([record[field] for record in self.records[budget]]))

    def time(self, budget: float) -> float | None:
        """Median time to first token in ms, if a seed was timed."""
        timed = [record[TIME] for record in self.records[budget] if TIME in record]
        return float(np.median(timed)) if timed else None

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
        if why := cell.failure():
            result.failures[cell.seed] = f"of time only ({why})"
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


def area_of(result: ArmResult, budgets: Sequence[float]) -> float:
    return float(area_under_curve(budgets, [result.mean(budget, "accuracy") for budget in budgets]))


def shared_budgets(first: ArmResult, second: ArmResult, budgets: Sequence[float]) -> list[float]:
    """Those that both meet; none if one has no budget, and so its own cost at each."""
    if not (first.budgeted and second.budgeted):
        return []
    return second.met(first.met(budgets))


def comparisons(
    results: Mapping[str, ArmResult],
    pairs: Sequence[tuple[str, str]],
    budgets: Sequence[float],
    images_Q: np.ndarray | None = None,
) -> list[Comparison]:
    """Tests of arms that met the same budgets, in area and at each budget; ``images_Q`` as ``images_of`` has it."""
    tests: list[Pair] = []
    for first, second in pairs:
        ours, theirs = results.get(first), results.get(second)
        if ours is None or theirs is None:
            continue
        both, single = shared_budgets(ours, theirs, budgets), ours.single or theirs.single
        scores = {budget: (ours.scores(budget), theirs.scores(budget)) for budget in both}
        tests += [Pair(first, second, budget, *scores[budget], single) for budget in both]
        if len(both) > 1:
            areas = [area_under_curve(both, np.stack([scores[b][side] for b in both], axis=-1)) for side in (0, 1)]
            tests.append(Pair(first, second, None, np.asarray(areas[0]), np.asarray(areas[1]), single))
    measured = next((len(test.first_RQ[0]) for test in tests), 0)
    return compare(tests, images_Q if images_Q is not None and len(images_Q) == measured else None)


def images_of(queries: DatasetQueries) -> np.ndarray:
    """(Q,) int64 the number of the image that each query shows; one without an image has a number of its own."""
    images_Q = np.arange(len(queries)) + len(queries)
    for number, rows in enumerate(queries.by_image()):
        images_Q[rows] = number
    return np.unique(images_Q, return_inverse=True)[1]


def _validations(cell: Cell) -> list[tuple[int, float, float]]:
    """Queries, seconds, and mean accuracy over the budgets, at each validation of a cell's training, if it had one."""
    folder = RunFolder(cell.run)
    return [
        (line["queries"], timing["seconds"], float(np.mean([own["accuracy"] for own in line["validation"].values()])))
        for line, timing in zip(folder.metrics(), folder.timing(), strict=False)
        if "validation" in line
    ]


def _convergence(points: Sequence[tuple[int, float, float]]) -> Convergence:
    """How soon a training converged, from its validations."""
    final = points[-1][2]
    since = points[-1]
    for point in reversed(points):
        if point[2] < final - MOST_LOST:
            break
        since = point
    return Convergence(int(since[0]), float(since[1]), float(final), float(points[-1][1]))
