"""What one call costs the device beside arithmetic: kernels launched, waits of the host for the device, copies."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable

import torch
from torch.profiler import ProfilerActivity, profile, supported_activities

from maskgym.eval.measure.latency import synchronise


def count_launches(call: Callable[[], object], device: torch.device) -> dict[str, int]:
    """Kernels, syncs and copies of one call, as ``counted`` names them; all 0 where no CUDA device can be profiled.

    Args:
        call: is run once, under the profiler; warm it up before.
        device: where it runs.
    """
    traced, around = _trace(call, device), _trace(lambda: None, device)  # the profiler waits for the device, too
    return {name: max(0, count - around[name]) for name, count in traced.items()}


def _trace(call: Callable[[], object], device: torch.device) -> dict[str, int]:
    activities = {ProfilerActivity.CUDA} & set(supported_activities())
    if not activities:
        call()
        return counted([])
    synchronise(device)
    with profile(activities=activities) as profiler:
        call()
        synchronise(device)
    return counted((event.name, event.device_type.name == "CUDA") for event in profiler.events() or [])


def counted(events: Iterable[tuple[str, bool]]) -> dict[str, int]:
    """How many events are ``kernels``, ``syncs`` (the host waits), ``copies_to_device`` and ``copies_to_host``.

    Args:
        events: names, and whether each ran on the device; the others are calls of CUDA's runtime.
    """
    counts = Counter({"kernels": 0, "syncs": 0, "copies_to_device": 0, "copies_to_host": 0})
    for name, on_device in events:
        if on_device and name.startswith("Memcpy HtoD"):
            counts["copies_to_device"] += 1
        elif on_device and name.startswith("Memcpy DtoH"):
            counts["copies_to_host"] += 1
        elif on_device and not name.startswith(("Memcpy", "Memset")):
            counts["kernels"] += 1
        elif not on_device and "Synchronize" in name:
            counts["syncs"] += 1
    return dict(counts)
