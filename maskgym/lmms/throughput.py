"""What answers took on average, for the harness's results."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from maskgym.eval.measure.evaluate import Record

AVERAGED = (
    "llm_flops_ratio",
    "llm_flops",
    "total_flops",
    "spent_llm_flops",
    "kept_tokens",
    "kept_heads",
    "kept_layers",
    "encode_ms",
    "answer_ms",
)


def throughput(records: Sequence[Sequence[Record]]) -> dict[str, Any]:
    """Keyword arguments of lmms-eval's ``log_metrics``.

    Args:
        records: of each request, by budget. Times are a batch's; each of its requests is given its share of them.

    Returns:
        Seconds, new tokens and their rate under the first budget, the one that is scored; and means over the requests
        by figure and budget (``llm_flops_ratio@0.5``).
    """
    scored = [own[0] for own in records]
    seconds = sum((one["encode_ms"] + one["answer_ms"]) / one["batch"] for one in scored) / 1000
    tokens = sum(one["new_tokens"] for one in scored)
    means = {
        f"{name}@{own[0]['budget']:g}": float(np.mean([one[name] / _sharing(name, one) for one in own]))
        for own in zip(*records, strict=True)
        for name in AVERAGED
    }
    return {
        "total_elapsed_time": seconds,
        "total_gen_tokens": tokens,
        "avg_speed": tokens / seconds,
        "additional_metrics": {"total_requests": len(scored), **means},
    }


def _sharing(name: str, record: Record) -> int:
    return record["batch"] if name.endswith("_ms") else 1
