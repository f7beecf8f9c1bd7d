"""Wall-clock time of a plan: encode, controller, prefill, time to first token, time per output token, peak memory.

Warm-up first, clocks read only after the device has finished, medians and 95th percentiles. Shape legend: B rows.
"""

from __future__ import annotations

import platform
import resource
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch

from backbones.backbone import Backbone
from backbones.encoding import Query
from backbones.latency_model import LatencyModel, plan_features
from policies.baselines import Planner, random_plans


@dataclass(frozen=True)
class Spread:
    """Milliseconds: median and 95th percentile."""

    p50: float
    p95: float

    @classmethod
    def of(cls, seconds: Sequence[float]) -> Spread:
        return cls(*(float(1000 * np.percentile(seconds, q)) for q in (50, 95)))


@dataclass(frozen=True)
class Latency:
    """How long one batch takes, part by part.

    Attributes:
        encode: image processing, vision tower and projector.
        controller: choosing the plans.
        prefill: the language model up to the first answer token's logits.
        ttft: time to first token, the three together as measured in one go.
        tpot: time per output token after the first.
        peak_memory_bytes: on CUDA of this measurement, on the CPU of the process so far.
    """

    encode: Spread
    controller: Spread
    prefill: Spread
    ttft: Spread
    tpot: Spread
    peak_memory_bytes: int


def synchronise(device: torch.device) -> None:
    """Wait until the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def timed(function: Callable[[], object], device: torch.device) -> float:
    """Seconds of one call."""
    synchronise(device)
    began = time.perf_counter()
    function()
    synchronise(device)
    return time.perf_counter() - began


def interleaved(
    sides: Mapping[str, Callable[[], object]], repeats: int, device: torch.device, warm_up: int = 1
) -> dict[str, float]:
    """Median seconds of each side, the sides taken in turn so that a busy machine slows all alike."""
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for round_number in range(warm_up + repeats):
        for name, function in sides.items():
            taken = timed(function, device)
            if round_number >= warm_up:
                seconds[name].append(taken)
    return {name: float(np.median(values)) for name, values in seconds.items()}


@torch.no_grad()
def measure(
    backbone: Backbone,
    planner: Planner,
    queries: Sequence[Query],
    budget: float,
    new_tokens: int = 8,
    repeats: int = 30,
    warm_up: int = 3,
) -> Latency:
    """Time one batch of queries under a planner.

    Args:
        backbone: answers.
        planner: chooses the plans.
        queries: B queries, one batch.
        budget: share of the full plan's LLM FLOPs.
        new_tokens: output tokens after the first that are timed.
        repeats: measurements.
        warm_up: calls before them.
    """
    device = backbone.device
    budgets_B = torch.full((len(queries),), budget, dtype=torch.float64, device=device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    parts: dict[str, list[float]] = {name: [] for name in ("encode", "controller", "prefill", "ttft", "tpot")}
    ids_B1 = torch.full((len(queries), 1), backbone.processor.tokenizer.eos_token_id, device=device)
    for round_number in range(warm_up + repeats):
        clock = [_now(device)]
        encoding = backbone.encode(queries)
        clock.append(_now(device))
        masks = planner.plan(encoding, budgets_B)
        clock.append(_now(device))
        _, cache = backbone.prefill(encoding, masks, cache=True)
        clock.append(_now(device))
        assert cache is not None
        for step in range(new_tokens):
            backbone.extend(ids_B1, encoding.next_rope_B + step, cache)
        clock.append(_now(device))
        if round_number >= warm_up:
            for name, taken in zip(("encode", "controller", "prefill"), np.diff(clock), strict=False):
                parts[name].append(float(taken))
            parts["ttft"].append(clock[3] - clock[0])
            parts["tpot"].append((clock[4] - clock[3]) / new_tokens)
    return Latency(**{name: Spread.of(values) for name, values in parts.items()}, peak_memory_bytes=_peak(device))


def calibrate(backbone: Backbone, queries: Sequence[Query], plans: int = 48, repeats: int = 7) -> LatencyModel:
    """Fit a latency model on random plans of single queries.

    Args:
        backbone: measured.
        queries: drawn from, one a plan.
        plans: how many plans to measure; each fourth is held out to state the error.
        repeats: measurements a plan, taken in rounds over all plans; their median counts.
    """
    encoding = backbone.encode([queries[number % len(queries)] for number in range(plans)])
    budgets_B = torch.linspace(0.25, 1.0, plans, dtype=torch.float64)[torch.randperm(plans)]
    masks = random_plans(backbone, encoding, budgets_B, torch.Generator().manual_seed(0))
    rows = [encoding.rows(torch.tensor([row])) for row in range(plans)]

    def prefill(row: int) -> None:
        with torch.no_grad():
            backbone.prefill(rows[row], masks[row : row + 1])

    seconds = interleaved({str(row): partial(prefill, row) for row in range(plans)}, repeats, backbone.device)
    features_BF = plan_features(backbone, encoding, masks).cpu().numpy()
    return LatencyModel.fit(
        device_name(backbone.device), backbone.name, features_BF, 1000 * np.array([*seconds.values()])
    )


def device_name(device: torch.device) -> str:
    """The device as a person would name it, with its threads on the CPU."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{platform.processor() or platform.machine()} CPU, {torch.get_num_threads()} threads"


def _now(device: torch.device) -> float:
    synchronise(device)
    return time.perf_counter()


def _peak(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
