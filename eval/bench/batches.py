"""Batches whose rows are under plans of their own: their prefill, the controller that chooses plans, launches."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch

from maskgym.backbones.backbone import Backbone
from maskgym.backbones.encodings.encoding import Encoding
from maskgym.backbones.plans.masks import Masks
from maskgym.eval.bench.engine import hugging_face, prefill
from maskgym.eval.bench.launches import count_launches
from maskgym.eval.bench.shapes import encode_noise
from maskgym.eval.measure.latency import interleaved
from maskgym.policies.baselines import random_plans
from maskgym.policies.controller.learned import ControllerPlanner
from maskgym.policies.controller.network import ControllerConfig, TwoLevelController

REPEATS = 30
"""Rounds at most; time ends them before."""


def batch_times(backbone: Backbone, rows: int, seconds: float) -> dict[str, Any]:
    """The prefill of a batch of random plans, each another, beside that of full plans and of Hugging Face's decoder.

    Args:
        backbone: runs them.
        rows: of the batch.
        seconds: to spend on repeats.

    Returns:
        Medians in milliseconds; the random plans' share of the LLM FLOPs, and the figures as
        ``maskgym.eval.bench.plans`` names them.
    """
    encoding = encode_noise(backbone, rows)
    masks = _mixed(backbone, encoding)
    sides = {
        "hf": partial(hugging_face, backbone, encoding),
        "full": partial(prefill, backbone, encoding, backbone.full(encoding)),
        "mixed": partial(prefill, backbone, encoding, masks),
    }
    times = interleaved(sides, REPEATS, backbone.device, seconds=seconds)
    share = float(backbone.cost(encoding, masks).llm.sum() / backbone.full_llm_flops(encoding).sum())
    return {
        "rows": rows,
        "share": share,
        **{f"{name}_ms": 1000 * taken for name, taken in times.items()},
        "full_over_hf": times["full"] / times["hf"],
        "mixed_over_full": times["mixed"] / times["full"],
        "speedup_over_cut": times["full"] / times["mixed"] * share,
    }


def controller_times(backbone: Backbone, rows: int, seconds: float) -> dict[str, Any]:
    """An untrained controller's plans for a batch, at half the FLOPs, beside the prefill under them and the full one.

    Args:
        backbone: runs the plans.
        rows: of the batch.
        seconds: to spend on repeats.

    Returns:
        Medians in milliseconds, and the controller's over both.
    """
    encoding = encode_noise(backbone, rows)
    plan = _choosing(backbone, encoding)
    sides: dict[str, Callable[[], object]] = {
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
    }


def launches(backbone: Backbone, batches: Sequence[int]) -> list[dict[str, Any]]:
    """What the prefills of full and of random plans, and the controller, launch for batches of so many rows
    (``maskgym.eval.bench.launches``)."""
    found = []
    for rows in batches:
        encoding = encode_noise(backbone, rows)
        calls: dict[str, Callable[[], object]] = {
            "full": partial(prefill, backbone, encoding, backbone.full(encoding)),
            "mixed": partial(prefill, backbone, encoding, _mixed(backbone, encoding)),
            "controller": _choosing(backbone, encoding),
        }
        for name, call in calls.items():
            call()
            found.append({"call": name, "rows": rows, **count_launches(call, backbone.device)})
    return found


def _mixed(backbone: Backbone, encoding: Encoding) -> Masks:
    """Random plans, at budgets spread over 0.3 to 0.9."""
    budgets_B = torch.linspace(0.3, 0.9, len(encoding), dtype=torch.float64)
    return random_plans(backbone, encoding, budgets_B, torch.Generator().manual_seed(0))


def _choosing(backbone: Backbone, encoding: Encoding) -> Callable[[], Masks]:
    """What lets an untrained controller choose plans at half the FLOPs."""
    torch.manual_seed(0)
    config = ControllerConfig.for_layout(backbone.layout, backbone.hidden, rule="fill")
    planner = ControllerPlanner(TwoLevelController(config), backbone, "untrained")
    budgets_B = torch.full((len(encoding),), 0.5, dtype=torch.float64, device=backbone.device)
    return partial(planner.plan, encoding, budgets_B)
