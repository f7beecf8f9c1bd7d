"""Every speed claim, as a ratio within one run."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from backbones import EncodingBank, load_backbone
from backbones.backbone import Backbone
from envs import MaskingCore, MaskingVecEnv, load_queries
from policies.baselines import random_plans

GOALS = {
    "env_over_forward": 0.9,
    "env_over_single": 5.0,
}
"""The goals that figures are compared with."""

Entry = dict[str, Any]


def interleaved(sides: dict[str, Callable[[], None]], repeats: int) -> dict[str, float]:
    """Median seconds of each side, the sides taken in turn so that a busy machine slows all alike."""
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for function in sides.values():
        function()
    for _ in tqdm(range(repeats), desc=" / ".join(sides), leave=False):
        for name, function in sides.items():
            began = time.perf_counter()
            function()
            seconds[name].append(time.perf_counter() - began)
    return {name: float(np.median(values)) for name, values in seconds.items()}


def entry(name: str, value: float, setting: str) -> Entry:
    return {"name": name, "value": round(value, 3), "goal": GOALS.get(name), "better": "higher", "setting": setting}


def bench_environment(backbone: Backbone, data: str, rows: int = 256, repeats: int = 15) -> list[Entry]:
    """Environment steps against the bare batched forward on the same queries and plans, and against one at a time."""
    source = load_queries(data, "validation", 2000)
    core = MaskingCore(backbone, source)
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
    actions = core.layout.flatten(masks).numpy().astype(np.int8)
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

    seconds = interleaved({"forward": forward, "environment": step, "one at a time": one_at_a_time}, repeats)
    setting = (
        f"{backbone.name}, {data}, {rows} rows, random plans at budgets 0.2 to 1, {torch.get_num_threads()} threads"
    )
    return [
        entry("env_over_forward", seconds["forward"] / seconds["environment"], setting),
        entry("env_over_single", (seconds["one at a time"] / single) / (seconds["environment"] / rows), setting),
    ]


def bench(backbone: str = "tiny", data: str = "easy-vqa") -> list[Entry]:
    """All figures."""
    return bench_environment(load_backbone(backbone), data)


def bench_table(entries: list[Entry]) -> str:
    rows = [("figure", "value", "goal", "setting")]
    for one in entries:
        goal = "" if one["goal"] is None else f"{'≥' if one['better'] == 'higher' else '≤'} {one['goal']}"
        rows.append((one["name"], str(one["value"]), goal, one["setting"]))
    widths = [max(len(row[column]) for row in rows) for column in range(4)]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)
