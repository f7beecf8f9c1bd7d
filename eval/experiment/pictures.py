"""An experiment's pictures.

Shape legend: N visual tokens, L layers, H head slots.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure

from eval.experiment.statistics import Estimate
from eval.experiment.summary import ArmResult
from eval.plan_pictures import show_heads, show_tokens
from eval.runs import RunFolder

FORMATS = ("png", "svg")
STYLES: Any = {"figure.figsize": (7, 4.6), "axes.grid": True, "grid.alpha": 0.3, "svg.hashsalt": "maskgym"}


def draw_tradeoff(
    results: Mapping[str, ArmResult],
    found: Mapping[tuple[str, float], tuple[Estimate, Estimate]],
    field: str,
    title: str,
    folder: Path,
) -> Path:
    """Accuracy over what is spent, a line an arm, with intervals over seeds."""
    label = {"llm_flops_ratio": "LLM FLOPs", "total_flops_ratio": "total FLOPs"}[field]
    with plt.rc_context(STYLES):
        figure, axes = plt.subplots(layout="constrained")
        colors = plt.colormaps["tab20"]
        for number, (name, result) in enumerate(results.items()):
            budgets = sorted(result.records)
            if not budgets:
                continue
            x = [100 * result.mean(budget, field) for budget in budgets]
            parts = [found[name, budget][0] for budget in budgets]
            y = np.array([100 * part.value for part in parts])
            errors = np.abs(np.array([[100 * part.low, 100 * part.high] for part in parts]).T - y)
            if result.budgeted:
                axes.errorbar(x, y, errors, marker="o", capsize=3, label=name, color=colors(number % 20))
            else:
                axes.plot(x, y, marker="*", markersize=12, linestyle="", label=name, color=colors(number % 20))
        axes.set(xlabel=f"{label} spent (% of the full plan, choosing included)", ylabel="accuracy (%)", title=title)
        axes.legend(fontsize=8, ncols=2)
        return _save(figure, folder, f"accuracy-{field.partition('_')[0]}-flops")


def draw_adherence(results: Mapping[str, ArmResult], folder: Path) -> Path:
    """What is spent over what is asked."""
    with plt.rc_context(STYLES):
        figure, axes = plt.subplots(layout="constrained")
        axes.plot([0, 100], [0, 100], color="0.5", linestyle="--", linewidth=1, label="asked")
        for name, result in results.items():
            if result.records and result.budgeted:
                budgets = sorted(result.records)
                spent = [100 * result.mean(budget, "llm_flops_ratio") for budget in budgets]
                axes.plot([100 * budget for budget in budgets], spent, marker="o", label=name)
        axes.set(xlabel="budget (% of the full plan's LLM FLOPs)", ylabel="spent (%)", title="Budgets")
        axes.legend(fontsize=8, ncols=2)
        return _save(figure, folder, "budgets")


def draw_learning(results: Mapping[str, ArmResult], folder: Path) -> Path | None:
    """Validation accuracy over queries, and over seconds of training, a line a run."""
    with plt.rc_context(STYLES):
        figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.4), sharey=True, layout="constrained")
        colors = plt.colormaps["tab10"]
        drawn = 0
        for name, result in results.items():
            label: str | None = name
            for cell in result.cells:
                folder_of_run = RunFolder(cell.run)
                lines = zip(folder_of_run.metrics(), folder_of_run.timing(), strict=False)
                points = [
                    (line["queries"], timing["seconds"], 100 * _mean_accuracy(line))
                    for line, timing in lines
                    if "validation" in line
                ]
                if not points:
                    continue
                queries, seconds, accuracy = zip(*points, strict=True)
                left.plot(queries, accuracy, color=colors(drawn % 10), alpha=0.7, label=label)
                right.plot(seconds, accuracy, color=colors(drawn % 10), alpha=0.7)
                label = None
            drawn += label is None
        if not drawn:
            plt.close(figure)
            return None
        left.set(xlabel="training queries", ylabel="validation accuracy (%), mean over budgets")
        right.set(xlabel="seconds of training")
        left.legend(fontsize=8)
        return _save(figure, folder, "learning")


def _mean_accuracy(line: Mapping[str, Any]) -> float:
    return float(np.mean([each["accuracy"] for each in line["validation"].values()]))


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
    with plt.rc_context({"axes.grid": False}):
        figure, grid = plt.subplots(
            len(shown),
            2 * len(budgets),
            figsize=(2.6 * len(budgets), 1.3 * len(shown) + 0.4),
            layout="constrained",
            squeeze=False,
        )
        for row, (policy, own) in enumerate(shown.items()):
            for column, budget in enumerate(budgets):
                left, right = grid[row, 2 * column], grid[row, 2 * column + 1]
                if budget not in own:
                    left.set_axis_off()
                    right.set_axis_off()
                    continue
                each = own[budget]
                show_tokens(left, image, each.tokens)
                show_heads(right, each.heads)
                right.set_title(each.answer or "(nothing)", fontsize=7, color="#1a7f37" if each.right else "#cf222e")
                if row == 0:
                    left.set_title(f"{100 * budget:g} %", fontsize=8)
                if column == 0:
                    left.set_ylabel(policy, fontsize=7, rotation=0, ha="right", va="center")
        figure.suptitle(question, fontsize=9)
        return _save(figure, folder, name, ("png",))


def _save(figure: Figure, folder: Path, name: str, formats: Sequence[str] = FORMATS) -> Path:
    """As PNG, and as SVG where asked; the path of the PNG."""
    for kind in formats:
        metadata = {"Date": None} if kind == "svg" else None  # equal figures give equal files
        figure.savefig(folder / f"{name}.{kind}", dpi=150, metadata=metadata)
    plt.close(figure)
    return folder / f"{name}.png"
