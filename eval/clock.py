"""How long a training took, and how much memory."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import torch

from eval.latency import peak_bytes


class TrainingClock:
    """Seconds of training, validations left out, and the most memory that was used.

    Args:
        device: of the backbone.
    """

    def __init__(self, device: torch.device):
        self.device, self.seconds = device, 0.0
        self._since: float | None = time.perf_counter()

    def pause(self) -> None:
        self.seconds, self._since = self._elapsed(), None

    def go_on(self) -> None:
        self._since = time.perf_counter()

    def read(self) -> dict[str, float]:
        """Seconds, and megabytes (10^6 bytes): of the device where it has memory of its own, else of the process."""
        return {"seconds": round(self._elapsed(), 3), "peak_memory_mb": round(peak_bytes(self.device) / 1e6, 1)}

    def _elapsed(self) -> float:
        return self.seconds + (0.0 if self._since is None else time.perf_counter() - self._since)


def throughput(timing: Sequence[dict[str, Any]], answers: int = 1) -> str:
    """A run's ``timing.jsonl`` in words, with how many plans each query was answered under; empty for a run of one
    line."""
    if len(timing) < 2:
        return ""
    first, last = timing[0], timing[-1]
    rate = (last["queries"] - first["queries"]) / max(1e-9, last["seconds"] - first["seconds"])
    plans = f", {rate * answers:,.0f} plans/s" if answers > 1 else ""
    return f"{rate:,.0f} queries/s{plans} in training, peak memory {last['peak_memory_mb']:,.0f} MB"
