"""Wall-clock time of a plan: encode, controller, prefill, time to first token, time per output token, peak memory.

Warm-up first, clocks read only after the device has finished, medians and 95th percentiles. Shape legend: B rows.
"""

from __future__ import annotations

import math
import platform
import resource
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from tqdm import tqdm

from maskgym.backbones.backbone import Backbone
from maskgym.backbones.encodings.encoding import Query
from maskgym.backbones.latency_model import LatencyModel, plan_features
from maskgym.policies.baselines import random_plans
from maskgym.policies.planner import Planner, adopted
from maskgym.policies.planning.projection import least_share

PARTS = ("encode", "controller", "prefill", "ttft", "tpot")


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
    """How long a batch takes, part by part.

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
    sides: Mapping[str, Callable[[], object]],
    repeats: int,
    device: torch.device,
    warm_up: int = 1,
    progress: str | None = None,
    seconds: float = math.inf,
) -> dict[str, float]:
    """Median seconds of each side, the sides taken in turn so that a busy machine slows all alike.

    Args:
        sides: what to time.
        repeats: rounds over all sides that count.
        device: waited for before a clock is read.
        warm_up: rounds before them.
        progress: label of a progress bar; none by default.
        seconds: after which no further round begins, once one has counted.
    """
    times: dict[str, list[float]] = {name: [] for name in sides}
    began = time.perf_counter()
    for round_number in tqdm(range(warm_up + repeats), desc=progress, unit="round", disable=progress is None):
        if round_number > warm_up and time.perf_counter() - began > seconds:
            break
        for name, function in sides.items():
            taken = timed(function, device)
            if round_number >= warm_up:
                times[name].append(taken)
    return {name: float(np.median(values)) for name, values in times.items()}


@torch.no_grad()
def measure(
    backbone: Backbone,
    planner: Planner,
    batches: Sequence[Sequence[Query]],
    budget: float,
    new_tokens: int = 8,
    repeats: int = 30,
    warm_up: int = 3,
) -> Latency:
    """Time batches of queries under a planner.

    Args:
        backbone: answers.
        planner: chooses the plans.
        batches: of queries; what is reported spreads over all of them.
        budget: share of the full plan's LLM FLOPs.
        new_tokens: output tokens after the first that are timed.
        repeats: measurements of each batch, in rounds over all.
        warm_up: rounds before them.

    Raises:
        InputError: a query that fails, or a budget below the smallest plan's cost.
    """
    if backbone.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(backbone.device)
    planner = adopted(planner)
    with _asked_for(backbone, planner):
        rounds = [
            [_time_parts(backbone, planner, queries, budget, new_tokens) for queries in batches]
            for _ in range(warm_up + repeats)
        ]
    counted = [taken for one_round in rounds[warm_up:] for taken in one_round]
    spreads = {name: Spread.of([taken[name] for taken in counted]) for name in PARTS}
    return Latency(**spreads, peak_memory_bytes=peak_bytes(backbone.device))


@contextmanager
def _asked_for(backbone: Backbone, planner: Planner) -> Iterator[None]:
    """Ask the vision tower only what this planner reads, whatever others have asked for."""
    before, backbone.signals = backbone.signals, set(planner.signals)
    try:
        yield
    finally:
        backbone.signals = before


def _time_parts(
    backbone: Backbone, planner: Planner, queries: Sequence[Query], budget: float, new_tokens: int
) -> dict[str, float]:
    """Seconds of each part of one batch."""
    device = backbone.device
    budgets_B = torch.full((len(queries),), budget, dtype=torch.float64, device=device)
    ids_B1 = torch.full((len(queries), 1), backbone.processor.tokenizer.eos_token_id, device=device)
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
    encode, controller, prefill, decode = np.diff(clock).tolist()
    ttft = encode + controller + prefill
    return dict(zip(PARTS, (encode, controller, prefill, ttft, decode / new_tokens), strict=True))


def calibrate(
    backbone: Backbone, queries: Sequence[Query], plans: int = 48, repeats: int = 7, progress: bool = False
) -> LatencyModel:
    """Fit a latency model on random plans of single queries.

    Args:
        backbone: measured.
        queries: each is taken for as many plans as the others.
        plans: how many plans to measure; each fourth is held out to state the error.
        repeats: measurements a plan, taken in rounds over all plans; their median counts.
        progress: whether to show a progress bar.
    """
    generator = torch.Generator().manual_seed(0)
    encoding = backbone.encode(queries).rows(torch.arange(plans) % len(queries))
    shares_B = torch.linspace(0.25, 1.0, plans, dtype=torch.float64)
    shares_B = shares_B[torch.randperm(plans, generator=generator)].to(backbone.device)
    budgets_B = shares_B.maximum(least_share(backbone, encoding)).clamp_max(1)
    masks = random_plans(backbone, encoding, budgets_B, generator)
    rows = [encoding.rows(torch.tensor([row])) for row in range(plans)]

    def prefill(row: int) -> None:
        with torch.no_grad():
            backbone.prefill(rows[row], masks[row : row + 1], cache=True)

    sides = {str(row): partial(prefill, row) for row in range(plans)}
    seconds = interleaved(sides, repeats, backbone.device, progress="calibration" if progress else None)
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


def peak_bytes(device: torch.device) -> int:
    """The most memory used: on CUDA since the last reset, on the CPU by the process so far."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024  # macOS says it in bytes, Linux in KiB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
