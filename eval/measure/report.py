"""Records as tables and plots."""

from __future__ import annotations

import io
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from maskgym.common.atomic import write_atomically
from maskgym.common.errors import printable

Record = dict[str, Any]

INTERVAL = "accuracy_interval"
"""Column of tables, no field of records: how far the 95 % interval reaches from the accuracy, on its wider side."""

COLUMNS = (
    ("policy", "policy", "{}"),
    ("budget_ms", "budget ms", "{:g}"),
    ("predicted_ms", "predicted ms", "{:.2f}"),
    ("keep", "keep", "{:.3g}"),
    ("budget", "budget", "{:.2f}"),
    ("accuracy", "accuracy %", "{:.2%}"),
    (INTERVAL, "± %", "{:.2%}"),
    ("f1", "F1 %", "{:.2%}"),
    ("llm_flops_ratio", "LLM FLOPs %", "{:.1%}"),
    ("spent_llm_flops_ratio", "spent %", "{:.1%}"),
    ("total_flops_ratio", "total FLOPs %", "{:.1%}"),
    ("budget_violations", "over budget", "{}"),
    ("overspent", "overspent %", "{:.1%}"),
    ("cut", "cut %", "{:.1%}"),
    ("kept_tokens", "tokens", "{:.1f}"),
    ("kept_heads", "heads", "{:.1f}"),
    ("kept_layers", "layers", "{:.1f}"),
    ("ttft_ms_p50", "TTFT ms", "{:.2f}"),
    ("tpot_ms_p50", "TPOT ms", "{:.2f}"),
)


def table(records: Sequence[Record]) -> str:
    """Records as an aligned Markdown table, with the columns that some record has."""
    records = [{**record, INTERVAL: max(errors(record))} if "accuracy" in record else record for record in records]
    shown = [column for column in COLUMNS if any(column[0] in record for record in records)]
    rows = [[head for _, head, _ in shown]]
    for record in records:
        cells = [form.format(record[key]) if key in record else "" for key, _, form in shown]
        rows.append([cell.replace("%", "") for cell in cells])
    return markdown(rows)


def errors(record: Record) -> tuple[float, float]:
    """How far below and above its accuracy a record's 95 % Wilson interval reaches.

    Unlike the standard error it does not vanish where all of a few answers are right. It also holds for partial scores,
    which between 0 and 1 vary no more than right and wrong ones do. Queries count as independent.
    """
    from statsmodels.stats.proportion import proportion_confint  # takes a second to import

    accuracy, n = record["accuracy"], record["n"]
    low, high = proportion_confint(accuracy * n, n, method="wilson")
    return max(0.0, accuracy - low), max(0.0, high - accuracy)


POINTS = ("score",)
"""Official scores that are no shares."""


def tables(records: Sequence[Record]) -> str:
    """The records' table, and a second one of the official scores by part where the data is a benchmark."""
    scored = [(record, *part) for record in records for part in record.get("parts", {}).items()]
    if not scored:
        return table(records)
    names = list(dict.fromkeys(name for *_, scores in scored for name in scores))
    rows = [["policy", "budget", "part", *(name if name in POINTS else f"{name} %" for name in names)]]
    for record, part, scores in scored:
        cells = [_official(name, scores[name]) if name in scores else "" for name in names]
        rows.append([record["policy"], f"{record['budget']:.2f}", part, *cells])
    return f"{table(records)}\n\n{markdown(rows)}"


def _official(name: str, score: float) -> str:
    return f"{score:.1f}" if name in POINTS else f"{100 * score:.2f}"


def markdown(rows: Sequence[Sequence[str]]) -> str:
    """Cells as an aligned Markdown table, the first row its head; a cell stays in its place, whatever it says."""
    rows = [[printable(cell).replace("|", "\\|") for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |" for row in rows
    ]
    lines.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    return "\n".join(lines)


def drawn(text: str) -> str:
    """Somebody's text as matplotlib draws it: no formula, no character that is none, and not too long for a picture."""
    return textwrap.shorten(printable(text), 80, placeholder=" …").replace("$", r"\$")


def plot_tradeoff(records: Sequence[Record], path: Path) -> None:
    """Accuracy over LLM FLOPs, one line a policy, with 95 % error bars."""
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    for policy in dict.fromkeys(record["policy"] for record in records):
        own = sorted((record for record in records if record["policy"] == policy), key=lambda r: r["llm_flops_ratio"])
        x = [100 * record["llm_flops_ratio"] for record in own]
        y = [100 * record["accuracy"] for record in own]
        bars = 100 * np.array([errors(record) for record in own]).T
        if len(own) == 1:
            axes.axhline(y[0], color="0.5", linestyle="--", linewidth=1, zorder=0)
            axes.errorbar(x, y, bars, marker="*", markersize=12, capsize=3, label=drawn(policy), color="0.2", zorder=5)
        else:
            axes.errorbar(x, y, bars, marker="o", capsize=3, label=drawn(policy))
    first = records[0]
    axes.set(xlabel="LLM FLOPs spent (% of the full plan, controller included)", ylabel="accuracy (%)")
    axes.set_title(drawn(f"{first['backbone']} on {first['data']} ({first['split']}, n = {first['n']:,})"))
    axes.grid(alpha=0.3)
    axes.legend()
    _save(figure, path)


def _save(figure: Figure, path: Path) -> None:
    """As PNG, whatever the file is called."""
    drawn = io.BytesIO()
    figure.savefig(drawn, dpi=150, format="png")
    write_atomically(path, drawn.getvalue())


def plot_training(metrics: Sequence[dict[str, Any]], path: Path) -> None:
    """Training reward, and validation accuracy at each budget, over the training's queries."""
    figure = Figure(figsize=(10, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    rewards = [(line["queries"], line["reward"]) for line in metrics if "reward" in line]
    if rewards:
        left.plot(*zip(*rewards, strict=True), linewidth=1)
    left.set(xlabel="queries", ylabel="mean reward of a rollout", title="training")
    validations = [line for line in metrics if "validation" in line]
    for budget in validations[0]["validation"] if validations else ():
        met = [line for line in validations if budget in line["validation"]]
        points = [(line["queries"], 100 * line["validation"][budget]["accuracy"]) for line in met]
        right.plot(*zip(*points, strict=True), marker="o", label=f"budget {budget}")
    right.set(xlabel="queries", ylabel="accuracy (%)", title="validation")
    if validations:
        right.legend()
    for axes in (left, right):
        axes.grid(alpha=0.3)
    _save(figure, path)
