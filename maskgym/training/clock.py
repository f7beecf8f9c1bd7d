"""How long a training took, and how much memory."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from maskgym.eval.measure.latency import peak_bytes


class TrainingClock:
    """Seconds of training, validations left out; of these, of updates, where a training tells them from the rest; and
    the most memory that was used.

    Args:
        device: of the backbone.
    """

    def __init__(self, device: torch.device):
        self.device, self.seconds = device, 0.0
        self._since: float | None = time.perf_counter()
        self.update_seconds: float | None = None
        self._updating_since: float | None = None

    def pause(self) -> None:
        self.seconds, self._since = self._elapsed(), None

    def go_on(self) -> None:
        self._since = time.perf_counter()

    def begin_update(self) -> None:
        self._updating_since = time.perf_counter()

    def end_update(self) -> None:
        """Nothing, if none has begun."""
        if self._updating_since is not None:
            self.update_seconds = (self.update_seconds or 0.0) + time.perf_counter() - self._updating_since
            self._updating_since = None

    def read(self) -> dict[str, float]:
        """Seconds, and megabytes (10^6 bytes): of the device where it has memory of its own, else of the process."""
        updates = {} if self.update_seconds is None else {"update_seconds": round(self.update_seconds, 3)}
        memory = round(peak_bytes(self.device) / 1e6, 1)
        return {"seconds": round(self._elapsed(), 3), **updates, "peak_memory_mb": memory}

    def go_on_from(self, read: Mapping[str, float]) -> None:
        """Continue a run of which this was read last."""
        self.seconds, self.update_seconds = read["seconds"], read.get("update_seconds")

    def _elapsed(self) -> float:
        return self.seconds + (0.0 if self._since is None else time.perf_counter() - self._since)


def throughput(timing: Sequence[dict[str, Any]], answers: int = 1) -> str:
    """A run's ``timing.jsonl`` in words, with how many plans each query was answered under; empty for a run of one
    line."""
    if len(timing) < 2:
        return ""
    first, last = timing[0], timing[-1]
    seconds = max(1e-9, last["seconds"] - first["seconds"])
    rate = (last["queries"] - first["queries"]) / seconds
    plans = f", {rate * answers:,.0f} plans/s" if answers > 1 else ""
    updates = ""
    if "update_seconds" in first and "update_seconds" in last:
        share = (last["update_seconds"] - first["update_seconds"]) / seconds
        updates = f" ({100 * share:.0f} % of the time in updates)"
    return f"{rate:,.0f} queries/s{plans} in training{updates}, peak memory {last['peak_memory_mb']:,.0f} MB"
