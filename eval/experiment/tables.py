"""Tables of what an experiment found, each with what it allows one to conclude, and what not."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from maskgym.eval.experiment.statistics import (
    Comparison,
    Estimate,
    area_under_curve,
    area_weights,
    hypervolume,
    show_p,
    standard_error,
)
from maskgym.eval.experiment.summary import MOST_LOST, NOT_YET, SPARED, ArmResult, area_of, enumerated, ranked
from maskgym.eval.measure.report import markdown


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
        met, spares = result.met(budgets), result.spares(budgets)
        cells = [
            show(found[name, budget][0]) + (f" ({100 * result.mean(budget, 'llm_flops_ratio'):.0f})" if spares else "")
            if budget in met
            else "—"
            for budget in budgets
        ]
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
    weights = enumerated([f"{100 * weight:.0f}" for weight in area_weights(budgets)])
    note = (
        "Accuracy in %, mean over seeds and kinds of questions (each kind counts alike), with a 95 % "
        "stratified-bootstrap interval over seeds; one seed gives no interval. In parentheses: the share of the LLM "
        f"FLOPs, in %, that is really spent, in rows that leave more than {100 * SPARED:g} % of a budget. Area: mean "
        "accuracy over the range of budgets asked, linear in the budget (by trapezoids, so that those measured weigh "
        f"{weights} %), each query counting alike; spread: its standard deviation over seeds, in points. Hypervolume: "
        "the area, in %, that the points of a policy, over what they really spend, dominate, from cost 0 to 1. A dash "
        "is a budget that cannot be met; an area from a budget on compares with such areas alone. Where two intervals "
        "do not meet, other seeds would most likely give the same order; they are of trainings, on one test split of "
        "one data set, and say nothing of other data or backbones."
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


def comparison_table(found: Sequence[Comparison]) -> Table:
    rows = [["policy", "against", "at", "difference, points", "p (Holm)", "verdict"]]
    for each in found:
        at = "area" if each.budget is None else f"{each.budget:g}"
        difference = f"{100 * each.difference.value:+.2f} [{100 * each.difference.low:+.2f}, "
        difference += f"{100 * each.difference.high:+.2f}]"
        rows.append([each.first, each.second, at, difference, show_p(each.p), each.verdict])
    areas = sum(each.budget is None for each in found)
    alone = " Where an arm has a single seed, nothing is said of other trainings of it." * any(e.single for e in found)
    note = (
        "Differences of means over seeds on the same queries. Intervals and p are over trainings and images together: "
        "the variance between an arm's seeds and that of the paired differences from image to image add up (Student's "
        "t, degrees of freedom by Welch and Satterthwaite). Intervals are not corrected; p is (Holm), in two families: "
        f"the {areas} areas, which are the main question, and the {len(found) - areas} single budgets. A difference "
        "that is shown holds for other trainings of the same kind and other queries of this kind, not for other data "
        "or VLMs; one that is not shown may be there all the same. Rules, and plans that were searched for, count as "
        f"given.{alone}"
    )
    return Table("Paired comparisons", rows, note)


def cost_table(results: Mapping[str, ArmResult], budgets: Sequence[float]) -> Table:
    """Accuracy, what plans keep and what they cost, budget by budget."""
    times = any(result.time(budget) is not None for result in results.values() for budget in result.records)
    head = ["policy", "budget", "accuracy %", "standard error", "LLM FLOPs %", "total FLOPs %"]
    rows = [[*head, "tokens", "heads", "layers"] + ["TTFT ms"] * times]
    for result in ranked(results, budgets):
        for budget in sorted(result.records):
            accuracy = [f"{100 * result.mean(budget, 'accuracy'):.2f}"]
            accuracy.append(f"{100 * standard_error(result.scores(budget)):.2f}")
            spent = [f"{100 * result.mean(budget, field):.1f}" for field in ("llm_flops_ratio", "total_flops_ratio")]
            kept = [f"{result.mean(budget, field):.1f}" for field in ("kept_tokens", "kept_heads", "kept_layers")]
            time = result.time(budget)
            own = f"{budget:g}" if result.budgeted else ""
            last = ["" if time is None else f"{time:.2f}"] * times
            rows.append([result.name, own, *accuracy, *spent, *kept, *last])
    note = (
        "Means over queries and seeds, each query counting alike. Standard error: of that accuracy, from query to "
        "query; it says how far other queries of the same kind would move it, and nothing of other trainings. LLM "
        "FLOPs are prefill and answer of the language model with everything that choosing the plan costs; total FLOPs "
        "have the vision tower and projector too. FLOPs compare policies on any machine; they are no times."
    )
    if times:
        note += " Times are medians of single queries on the machine named below, and compare only within this table."
    return Table("Cost and accuracy, point by point", rows, note)


def convergence_table(results: Mapping[str, ArmResult], budgets: Sequence[float]) -> Table:
    head = ["policy", "seeds", "queries to converge", "seconds to converge", "seconds in all"]
    rows = [[*head, "final validation %", "spread over seeds"]]
    for result in ranked(results, budgets):
        found = result.converged
        if not found:
            continue
        finals = [100 * each.final for each in found]
        spread = f"{np.std(finals, ddof=1):.2f}" if len(finals) > 1 else ""
        times = [(each.queries, each.seconds, each.whole) for each in found]
        soon = [f"{median:,.0f}" for median in np.median(times, axis=0)]
        rows.append([result.name, str(len(found)), *soon, f"{np.mean(finals):.1f}", spread])
    note = (
        "Converged: from then on mean validation accuracy over the budgets stays within "
        f"{100 * MOST_LOST:g} point of its end. Medians over seeds; seconds of training alone. Spread: standard "
        "deviation of the final accuracy, in points. Queries compare trainings on any machine, seconds only those that "
        "had this one for themselves; validations are some thousand queries apart, so nothing finer can be told."
    )
    return Table("Convergence and stability", rows, note)
