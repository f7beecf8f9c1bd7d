"""Batches of one query each under a plan of its own: their prefill, the controller that chooses the plans, launches."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch

from backbones.backbone import Backbone
from eval.bench_engine import hugging_face, prefill
from eval.bench_shapes import encode_noise
from eval.latency import interleaved
from eval.launches import count_launches
from policies.baselines import random_plans
from policies.controller import ControllerConfig, TwoLevelController
from policies.learned import ControllerPlanner

REPEATS = 30
"""Rounds at most; time ends them before."""


def batch_times(backbone: Backbone, rows: int, seconds: float) -> dict[str, Any]:
    """The prefill of a batch of random plans, each another, beside that of full plans and of Hugging Face's decoder.

    Args:
        backbone: runs them.
        rows: of the batch.
        seconds: to spend on repeats.

    Returns:
        Medians in milliseconds, ``over_full`` and ``over_hf``, ``speedup_over_cut``, and by kind what the random
        plans' prefill launches (``eval.launches``).
    """
    encoding = encode_noise(backbone, rows)
    budgets_B = _budgets(backbone, rows)
    masks = random_plans(backbone, encoding, budgets_B, torch.Generator().manual_seed(0))
    mixed = partial(prefill, backbone, encoding, masks)
    sides = {
        "hf": partial(hugging_face, backbone, encoding),
        "full": partial(prefill, backbone, encoding, backbone.full(encoding)),
        "mixed": mixed,
    }
    times = interleaved(sides, REPEATS, backbone.device, seconds=seconds)
    share = float(backbone.cost(encoding, masks).llm.sum() / backbone.full_llm_flops(encoding).sum())
    return {
        "rows": rows,
        "share": share,
        **{f"{name}_ms": 1000 * taken for name, taken in times.items()},
        "full_over_hf": times["full"] / times["hf"],
        "over_full": times["mixed"] / times["full"],
        "speedup_over_cut": times["full"] / times["mixed"] * share,
        **count_launches(mixed, backbone.device),
    }


def controller_times(backbone: Backbone, rows: int, seconds: float) -> dict[str, Any]:
    """An untrained controller's plans for a batch, at half the FLOPs, beside the prefill under them and the full one.

    Args:
        backbone: runs the plans.
        rows: of the batch.
        seconds: to spend on repeats.

    Returns:
        Medians in milliseconds, the controller's over both, and by kind what it launches (``eval.launches``).
    """
    torch.manual_seed(0)
    config = ControllerConfig.for_layout(backbone.layout, backbone.hidden, rule="fill")
    planner = ControllerPlanner(TwoLevelController(config), backbone, "untrained")
    encoding = encode_noise(backbone, rows)
    budgets_B = torch.full((rows,), 0.5, dtype=torch.float64, device=backbone.device)
    plan = partial(planner.plan, encoding, budgets_B)
    sides = {
        "controller": plan,
        "planned": partial(prefill, backbone, encoding, plan()),
        "full": partial(prefill, backbone, encoding, backbone.full(encoding)),
    }
    times = interleaved(sides, REPEATS, backbone.device, seconds=seconds)
    return {
        "rows": rows,
        **{f"{name}_ms": 1000 * taken for name, taken in times.items()},
        "controller_over_planned": times["controller"] / times["planned"],
        "controller_over_full": times["controller"] / times["full"],
        "planned_over_full": times["planned"] / times["full"],
        **count_launches(plan, backbone.device),
    }


def _budgets(backbone: Backbone, rows: int) -> torch.Tensor:
    """(rows,) shares from 0.3 to 0.9, in a mixed order."""
    order = torch.randperm(rows, generator=torch.Generator().manual_seed(0))
    return torch.linspace(0.3, 0.9, rows, dtype=torch.float64)[order].to(backbone.device)
