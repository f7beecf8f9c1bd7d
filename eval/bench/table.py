"""Every speed claim, as a ratio within one run; ``python -m maskgym.eval bench`` prints them beside their goals."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from maskgym.backbones import Backbone, EncodingBank
from maskgym.envs import MaskingCore, MaskingVecEnv, load_queries
from maskgym.eval.bench.data import bench_data
from maskgym.eval.bench.engine import bench_engine
from maskgym.eval.measure.latency import interleaved
from maskgym.policies.baselines import random_plans

Entry = dict[str, Any]

GOALS: dict[str, tuple[str, float]] = {
    "env_over_forward": ("higher", 0.95),
    "env_over_single": ("higher", 5.0),
    "full_plan_overhead": ("lower", 1.03),
    **{f"speedup_over_cut_{axis}_50": ("higher", 0.9) for axis in ("tokens", "layers", "heads", "all")},
    **{f"speedup_over_cut_{axis}_25": ("higher", 0.8) for axis in ("tokens", "layers", "heads", "all")},
    "speedup_over_cut_mixed_batch": ("higher", 0.7),
    "tpot_half_layers": ("lower", 0.6),
    "prefill_speedup_over_cut_64_tokens": ("higher", 0.68),
    "ttft_speedup_over_cut_64_tokens": ("higher", 0.49),
    "stream_growth_mb": ("lower", 64.0),
}
"""The goals that figures are compared with: which way is better, and the goal. The two on 64 tokens are DiffPrune's
figures."""


def entry(name: str, value: float, setting: str) -> Entry:
    """One figure; without a stated goal, it is a time, lower is better and the goal is null."""
    better, goal = GOALS.get(name, ("lower", None))
    return {"name": name, "value": round(value, 3), "goal": goal, "better": better, "setting": setting}


def bench_environment(backbone: Backbone, data: str, rows: int = 256, repeats: int = 15) -> list[Entry]:
    """Environment steps against the bare batched forward on the same queries and plans, and against one at a time."""
    core = MaskingCore(backbone, load_queries(data, "validation", 2000))
    core.bank.failures(range(len(core.source)))  # images are encoded once in a training, not in each step
    venv = MaskingVecEnv(core, rows)
    venv.seed(0)
    venv.reset()
    single = min(rows, 32)
    generator = torch.Generator().manual_seed(0)
    bank: EncodingBank = core.bank
    numbers = venv.slots.numbers
    encoding = bank.gather(numbers)
    budgets = torch.rand(rows, generator=generator, dtype=torch.float64) * 0.8 + 0.2
    masks = random_plans(backbone, encoding, budgets, generator)
    actions = core.layout.flatten(masks).cpu().numpy().astype(np.int8)
    share = np.full(rows, 1.0, np.float32)

    def forward() -> None:
        with torch.no_grad():
            backbone.prefill(encoding, masks)

    def step() -> None:
        venv.slots.numbers, venv.slots.budgets = numbers, share
        venv.step(actions)

    def one_at_a_time() -> None:
        for row in range(single):
            core.step(numbers[row : row + 1], share[row : row + 1], actions[row : row + 1])

    sides = {"forward": forward, "environment": step, "one at a time": one_at_a_time}
    seconds = interleaved(sides, repeats, backbone.device)
    threads = torch.get_num_threads()
    setting = f"{backbone.name}, {data}, {rows} rows, random plans at budgets 0.2 to 1, {threads} threads"
    per_query = {"alone": seconds["one at a time"] / single, "batched": seconds["environment"] / rows}
    return [
        entry("env_over_forward", seconds["forward"] / seconds["environment"], setting),
        entry("env_over_single", per_query["alone"] / per_query["batched"], setting),
    ]


def bench(
    backbone: Backbone, data: str, parts: tuple[str, ...] = ("env", "engine"), shape: str = "small"
) -> list[Entry]:
    """All figures of the parts asked for; the engine runs where the backbone is, in its dtype."""
    entries = bench_environment(backbone, data) if "env" in parts else []
    if "engine" in parts:
        entries += [entry(*figure) for figure in bench_engine(shape, str(backbone.device), backbone.model.dtype)]
    if "data" in parts:
        entries.append(entry(*bench_data()))
    return entries


def bench_table(entries: list[Entry]) -> str:
    rows = [("figure", "value", "goal", "setting")]
    for one in entries:
        goal = "" if one["goal"] is None else f"{'≥' if one['better'] == 'higher' else '≤'} {one['goal']}"
        rows.append((one["name"], str(one["value"]), goal, one["setting"]))
    widths = [max(len(row[column]) for row in rows) for column in range(4)]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)
