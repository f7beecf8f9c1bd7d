"""An experiment's pictures.

Shape legend: N visual tokens, L layers, H head slots, R seeds, P validations, C queries, seconds and accuracy.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from maskgym.eval.experiment.arms import ESTIMATORS, FULL
from maskgym.eval.experiment.cells import TIME
from maskgym.eval.experiment.statistics import Estimate
from maskgym.eval.experiment.summary import ArmResult, ranked
from maskgym.eval.measure.plan_pictures import show_heads, show_tokens
from maskgym.eval.measure.report import drawn

FORMATS = ("png", "svg")
WIDTH, HEIGHT, LEGEND_ROW = 5.6, 3.7, 0.22
"""In inches; a phone shows these some 360 pixels wide, so that letters of 11 points are 10 pixels high there."""
STYLES: Any = {
    "font.size": 11,
    "axes.grid": True,
    "grid.alpha": 0.3,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.frameon": False,
    "legend.fontsize": 10,
    "svg.hashsalt": "maskgym",
}
STRONG = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#332288", "#56b4e9", "#882255")
MUTED = ("#7f7f7f", "#b0906a", "#7fa0b8", "#c08aa3", "#88ab83", "#a39ac9", "#c2a552", "#a86f6f", "#5f8f8c")
DASHES = ("-", "--", "-.", ":")
COSTS = {
    "llm_flops_ratio": ("accuracy-llm-flops", "LLM FLOPs spent, choosing included"),
    "total_flops_ratio": ("accuracy-total-flops", "total FLOPs spent, choosing included"),
    TIME: ("accuracy-first-token", "time to first token, choosing included"),
}
"""What accuracy is plotted over: file and label of the axis."""
LIMIT: Any = {"color": "0.25", "linestyle": (0, (6, 3)), "linewidth": 1.4}
"""Of the line that others are seen against: the full model's accuracy, or all that was asked."""


@dataclass(frozen=True)
class Look:
    """How an arm is drawn in every plot of a report.

    Attributes:
        ours: whether it is one of the controllers that are compared; these stand out.
        options: of ``Axes.plot``.
    """

    ours: bool
    options: dict[str, Any]


def is_ours(name: str) -> bool:
    """Whether an arm of this name is a two-level controller: these are called by their estimator."""
    return name.split()[0] in ESTIMATORS


def looks(names: Sequence[str]) -> dict[str, Look]:
    """Controllers thick and saturated, the others thin and muted; no two alike up to eight and 36 of them."""
    ours = sorted((name for name in names if is_ours(name)), key=lambda name: " " in name)  # of all axes: alike in all
    found = {}
    for number, name in enumerate(ours):
        options = {"color": STRONG[number % len(STRONG)], "marker": "osD^vPXh"[number % 8], "linewidth": 2.4}
        found[name] = Look(True, {**options, "markersize": 6, "zorder": 4})
    for number, name in enumerate(name for name in names if not is_ours(name)):
        options = {"color": MUTED[number % len(MUTED)], "linestyle": DASHES[number % len(DASHES)]}
        found[name] = Look(False, {**options, "marker": ".", "markersize": 5, "linewidth": 1.2, "zorder": 3})
    return found


def draw_tradeoff(
    results: Mapping[str, ArmResult],
    found: Mapping[tuple[str, float], tuple[Estimate, Estimate]],
    budgets: Sequence[float],
    field: str,
    title: str,
    folder: Path,
) -> Path | None:
    """Accuracy over a cost, a line an arm, the best first in the legend, with intervals over seeds; none without costs.

    FLOPs are means over seeds; times are of those that were timed.
    """
    file, label = COSTS[field]
    look = looks(list(results))
    with plt.rc_context(STYLES):
        figure, axes = plt.subplots(layout="constrained")
        heights: dict[str, list[float]] = {}
        handles: list[Any] = []
        for result in ranked(results, budgets):
            name, costs = result.name, _costs(result, field)
            if not costs:
                continue
            parts = [found[name, budget][0] for budget in costs]
            x, y = list(costs.values()), [100 * part.value for part in parts]
            heights[name] = y
            if name == FULL.name:
                at = f", {x[0]:.1f} ms" if field == TIME else ""
                handles.append(axes.axhline(y[0], label=f"full ({y[0]:.1f} %{at})", **LIMIT))
            elif not result.budgeted:
                color = look[name].options["color"]
                handles += axes.plot(x, y, marker="*", markersize=10, linestyle="", color=color, label=name, zorder=3)
            else:
                errors = 100 * np.array([[part.value - part.low, part.high - part.value] for part in parts]).T
                cap = 3 if look[name].ours else 0
                bars: dict[str, Any] = {"capsize": cap, "elinewidth": 1, "label": name}
                handles.append(axes.errorbar(x, y, errors, **bars, **look[name].options))
        if not heights:
            plt.close(figure)
            return None
        _cut(axes, heights)
        axes.set(xlabel=label, ylabel="accuracy")
        axes.set_title(title, fontsize=11)
        _percent(axes.yaxis)
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:g} {'ms' if field == TIME else '%'}")
        _legend(figure, handles)
        return _save(figure, folder, file)


def _costs(result: ArmResult, field: str) -> dict[float, float]:
    """By budget, in rising order, what is spent: a share in %, or ms."""
    budgets = sorted(result.records)
    if field == TIME:
        return {budget: time for budget in budgets if (time := result.time(budget)) is not None}
    return {budget: 100 * result.mean(budget, field) for budget in budgets}


def draw_adherence(results: Mapping[str, ArmResult], budgets: Sequence[float], folder: Path) -> Path:
    """What is spent of what is asked."""
    look = looks(list(results))
    with plt.rc_context(STYLES):
        figure, axes = plt.subplots(layout="constrained")
        handles: list[Any] = [axes.axhline(1, label="all that was asked", **LIMIT)]
        for result in ranked(results, budgets):
            if result.budgeted:
                own = sorted(result.records)
                shares = [result.mean(budget, "llm_flops_ratio") / budget for budget in own]
                x = [100 * budget for budget in own]
                handles += axes.plot(x, shares, label=result.name, **look[result.name].options)
        axes.set(xlabel="LLM FLOPs asked (budget)", ylabel="spent / asked", xscale="log")
        axes.set_xticks([100 * budget for budget in budgets])
        axes.set_xticks([], minor=True)
        axes.set_title("What plans spend of their budget", fontsize=11)
        _percent(axes.xaxis)
        _legend(figure, handles)
        return _save(figure, folder, "budgets")


def draw_learning(results: Mapping[str, ArmResult], budgets: Sequence[float], folder: Path) -> Path | None:
    """Validation accuracy over queries, and over seconds of training: each seed, their mean and standard deviation."""
    look = looks(list(results))
    with plt.rc_context(STYLES):
        figure, both = plt.subplots(2, 1, layout="constrained")
        heights: dict[str, list[float]] = {}
        handles: list[Any] = []
        for result in ranked(results, budgets):
            runs = [np.array(run) * (1, 1, 100) for run in result.curves]
            if not runs:
                continue
            options = {**look[result.name].options, "markersize": 0}
            color, heights[result.name] = options["color"], [height for run_PC in runs for height in run_PC[:, 2]]
            points_RPC = np.stack([run_PC[: min(map(len, runs))] for run_PC in runs])
            mean_PC, spread_P = points_RPC.mean(0), points_RPC[..., 2].std(0)
            for column, axes in enumerate(both):
                if len(runs) > 1:
                    for run_PC in runs:
                        axes.plot(run_PC[:, column], run_PC[:, 2], color=color, linewidth=0.8, alpha=0.3)
                    band = (mean_PC[:, 2] - spread_P, mean_PC[:, 2] + spread_P)
                    axes.fill_between(mean_PC[:, column], *band, color=color, alpha=0.15, linewidth=0)
                (line,) = axes.plot(mean_PC[:, column], mean_PC[:, 2], label=result.name, **options)
            handles.append(line)
        if not heights:
            plt.close(figure)
            return None
        _cut(both[0], heights, rivals=0)
        both[0].set_title("Learning curves, mean over budgets", fontsize=11)
        for axes, label in zip(both, ("training queries", "seconds of training"), strict=True):
            axes.set(xlabel=label, ylabel="validation accuracy")
            axes.xaxis.set_major_locator(MaxNLocator(5))
            axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.7g}")
        _percent(both[0].yaxis, both[1].yaxis)
        _legend(figure, handles, panels=2)
        return _save(figure, folder, "learning")


def _cut(axes: Axes, heights: Mapping[str, Sequence[float]], rivals: float = 0.75) -> None:
    """End the axis above far worse points, which would squash the rest, and say so.

    Args:
        axes: of accuracies.
        heights: by arm, its points in %.
        rivals: the share of the arms besides our controllers, the best, of which half of the points stay in sight;
            0: none need, where there are any of ours.
    """
    every = [height for own in heights.values() for height in own]
    ours = [height for name, own in heights.items() if is_ours(name) for height in own]
    middles = [float(np.median(own)) for name, own in heights.items() if name != FULL.name and not is_ours(name)]
    counted = middles and (rivals > 0 or not ours)
    shown = ours + ([float(np.quantile(middles, 1 - rivals, method="higher"))] if counted else [])
    floor = min(shown, default=min(every))
    low = math.floor(floor - 0.15 * (max(every) - floor))
    if min(every) >= low - 0.5 * (max(every) - low):
        return
    axes.set_ylim(bottom=low, top=max(every) + 0.05 * (max(every) - low))
    below = sum(min(own) < low for own in heights.values())
    note = f"{below} {'policies go' if below > 1 else 'policy goes'} below {low} %"
    axes.text(0.99, 0.02, note, transform=axes.transAxes, ha="right", fontsize=9, color="0.35")


def _percent(*sides: Any) -> None:
    for side in sides:
        side.set_major_formatter(lambda value, _: f"{value:g} %")


def _legend(figure: Figure, handles: Sequence[Any], panels: int = 1) -> None:
    """Below the panels, in this order; the figure grows for it, and there are two columns if there are many."""
    columns = 2 if len(handles) > 3 else 1
    rows = math.ceil(len(handles) / columns)
    figure.set_size_inches(WIDTH, panels * HEIGHT * (1 if panels == 1 else 0.8) + rows * LEGEND_ROW)
    figure.legend(handles=handles, loc="outside lower center", ncols=columns)


@dataclass(frozen=True)
class Shown:
    """What a policy kept for a query at a budget.

    Attributes:
        tokens: (N,) bool, of the image's visual tokens.
        heads: (L, H) bool, those of dropped layers left out.
        answer: what was said.
        right: whether that is accepted.
    """

    tokens: np.ndarray
    heads: np.ndarray
    answer: str
    right: bool


def draw_gallery(
    image: Any, question: str, shown: Mapping[str, Mapping[float, Shown]], folder: Path, name: str
) -> Path:
    """What each policy kept for one query at some budgets: the image with dropped tokens dark, and heads x layers."""
    budgets = list(dict.fromkeys(budget for own in shown.values() for budget in own))
    with plt.rc_context({"axes.grid": False, "font.size": 11}):
        figure = plt.figure(figsize=(WIDTH, 1.7 * len(shown) + 0.4), layout="constrained")
        figure.suptitle(drawn(question), fontsize=12)
        for part, (policy, own) in zip(
            figure.subfigures(len(shown), 1, squeeze=False).flat, shown.items(), strict=True
        ):
            part.suptitle(policy, fontsize=11, fontweight="bold", x=0.01, ha="left")
            grid = part.subplots(1, 2 * len(budgets), width_ratios=[3, 2] * len(budgets), squeeze=False)[0]
            for column, budget in enumerate(budgets):
                left, right = grid[2 * column : 2 * column + 2]
                if budget not in own:
                    left.set_axis_off()
                    right.set_axis_off()
                    continue
                each = own[budget]
                show_tokens(left, image, each.tokens)
                show_heads(right, each.heads)
                left.set_title(f"{100 * budget:g} %", fontsize=10)
                left.set_xlabel(each.answer or "(nothing)", fontsize=10, color="#1a7f37" if each.right else "#cf222e")
        return _save(figure, folder, name, ("png",))


def _save(figure: Figure, folder: Path, name: str, formats: Sequence[str] = FORMATS) -> Path:
    """As PNG, and as SVG where asked; the path of the PNG."""
    for kind in formats:
        metadata = {"Date": None} if kind == "svg" else None  # equal figures give equal files
        figure.savefig(folder / f"{name}.{kind}", dpi=150, metadata=metadata)
    plt.close(figure)
    return folder / f"{name}.png"
