"""Times on the command line: queries to time, times as records and tables, latency models that are of this device."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from maskgym.backbones.backbone import Backbone
from maskgym.backbones.encodings.encoding import EncodingBank, Query
from maskgym.backbones.latency_model import LatencyModel
from maskgym.common.errors import InputError
from maskgym.eval.measure.failures import report_failed
from maskgym.eval.measure.latency import Latency, device_name, measure
from maskgym.eval.measure.report import markdown
from maskgym.policies.planner import Planner

Record = dict[str, Any]

REPEATS, WARM_UP = 3, 1
"""Rounds over the queries that ``eval run --timing`` counts, and those before them."""


def first_queries(bank: EncodingBank, count: int) -> list[Query]:
    """The first ``count`` queries that do not fail, or as many as there are.

    Raises:
        InputError: all fail.
    """
    reported, found = len(bank.failed), []
    for number in range(len(bank)):
        found += bank.gather_valid([number])[1]
        if len(found) == count:
            break
    report_failed(bank, reported)
    return [bank.source[number] for number in found]


def add_timing(planner: Planner, backbone: Backbone, queries: Sequence[Query], records: Sequence[Record]) -> None:
    """Time a planner's queries one by one and put the times into its records, at the budget of each."""
    batches = [[query] for query in queries]
    for record in tqdm(records, desc=f"{planner.name}, timing", unit="budget"):
        budget = record["budget"] if planner.budgeted else 1.0
        record |= timing_fields(measure(backbone, planner, batches, budget, repeats=REPEATS, warm_up=WARM_UP))


def timing_fields(latency: Latency) -> Record:
    """Milliseconds, and memory in megabytes (10^6 bytes), as records name them."""
    return {
        "ttft_ms_p50": latency.ttft.p50,
        "ttft_ms_p95": latency.ttft.p95,
        "tpot_ms_p50": latency.tpot.p50,
        "encode_ms_p50": latency.encode.p50,
        "controller_ms_p50": latency.controller.p50,
        "prefill_ms_p50": latency.prefill.p50,
        "peak_memory_mb": latency.peak_memory_bytes / 1e6,
    }


def latency_table(rows: Sequence[tuple[str, float, Latency]]) -> str:
    """Policies, budgets and their times as a Markdown table: median / 95th percentile."""
    heads = ["policy", "budget", "encode ms", "controller ms", "prefill ms", "TTFT ms", "TPOT ms", "peak memory MB"]
    cells = [heads]
    for policy, budget, latency in rows:
        spreads = (latency.encode, latency.controller, latency.prefill, latency.ttft, latency.tpot)
        times = [f"{spread.p50:.2f} / {spread.p95:.2f}" for spread in spreads]
        cells.append([policy, f"{budget:.2f}", *times, f"{latency.peak_memory_bytes / 1e6:.0f}"])
    return markdown(cells)


def load_latency_model(path: Path, backbone: Backbone) -> LatencyModel:
    """A latency model of this backbone on this device.

    Raises:
        InputError: an unreadable file, or a model that was calibrated on another device or for another backbone.
    """
    model, here = LatencyModel.load(path), device_name(backbone.device)
    if (model.backbone, model.device) != (backbone.name, here):
        raise InputError(
            f"the latency model {str(path)!r} is of backbone {model.backbone!r} on {model.device!r}; this is "
            f"{backbone.name!r} on {here!r}: calibrate here with {how_to_calibrate(backbone.name, str(path))}"
        )
    return model


def how_to_calibrate(backbone: str, out: str = "latency.json") -> str:
    return shlex.join(["python", "-m", "maskgym.eval", "latency", "--backbone", backbone, "--out", out])
