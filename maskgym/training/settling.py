"""Whether a training still gets better, by its validations."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

FLOPS_GAIN = 0.01
"""Share of the full plan's LLM FLOPs; spending so much less for the same answers is a gain, too."""


class Settling:
    """Counts the validations since the last one that was a gain: more right answers, or clearly fewer FLOPs.

    Both are means over the budgets that were met, for a controller may gain at some budgets only.

    Args:
        patience: validations without a gain after which the training has settled; 0: it never does.
    """

    def __init__(self, patience: int):
        self.patience = patience
        self.accuracy, self.flops, self.stale = -np.inf, np.inf, 0

    @property
    def settled(self) -> bool:
        return 0 < self.patience <= self.stale

    def see(self, records: Sequence[Mapping[str, Any]]) -> None:
        """Take account of one validation.

        Args:
            records: one for each budget that was met; none: nothing can be said.
        """
        if not records:
            return
        accuracy, flops = (float(np.mean([record[name] for record in records])) for name in GAINS)
        gained = accuracy > self.accuracy or flops < self.flops - FLOPS_GAIN
        self.stale = 0 if gained else self.stale + 1
        self.accuracy = max(self.accuracy, accuracy)
        self.flops = flops if gained else self.flops

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps of it; JSON data."""
        seen = np.isfinite(self.accuracy)
        return {"best": [self.accuracy, self.flops] if seen else None, "stale": self.stale}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Continue from ``state``."""
        self.accuracy, self.flops = state["best"] or (-np.inf, np.inf)
        self.stale = state["stale"]


GAINS = ("accuracy", "llm_flops_ratio")
"""What a validation is judged by."""


class Settled(Exception):
    """Ends a training between two updates, where a library's loop has no other way out."""
