"""``python -m maskgym.eval gpu``: what this project claims, measured on one GPU within a given time, step by step."""

from __future__ import annotations

import gc
import json
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Literal

import torch
import transformers

from maskgym.backbones import Backbone, load_backbone
from maskgym.common import atomic
from maskgym.common.errors import InputError
from maskgym.common.run_folder import check_place
from maskgym.common.time_limit import within
from maskgym.eval.bench.batches import batch_times, controller_times, launches
from maskgym.eval.bench.exact import exactness, in_both_types
from maskgym.eval.bench.plans import prefill_times, token_times
from maskgym.eval.bench.shapes import llava_7b
from maskgym.eval.bench.trainings import gumbel_speed, ppo_speed
from maskgym.eval.measure.latency import device_name, peak_bytes
from maskgym.eval.measure.report import markdown

Result = dict[str, Any]


@dataclass
class Machine:
    """The models that the steps share, of LLaVA-1.5-7B's shape with random weights.

    Args:
        device: where they are made.
        vision: other sizes of the vision tower, and
        text: of the language model; for a try where there is no GPU.
    """

    device: str = "cuda"
    vision: dict[str, Any] = field(default_factory=dict)
    text: dict[str, Any] = field(default_factory=dict)

    @cached_property
    def open(self) -> Backbone:
        """In bfloat16, without protected layers."""
        return llava_7b(self.device, torch.bfloat16, self.vision, self.text)

    @cached_property
    def guarded(self) -> Backbone:
        """The same model with the first layer protected, so that no plan is empty."""
        return _guarded(self.open)

    def exact(self) -> list[Result]:
        """``in_both_types`` of three layers of this width, and of the embedded VLM."""
        few = {"num_hidden_layers": 3}
        made: dict[str, Callable[[], Backbone]] = {
            "7B width, 3 layers": lambda: _guarded(llava_7b(self.device, torch.float32, self.vision, self.text | few)),
            "tiny": partial(load_backbone, "tiny", device=self.device),
        }
        return [{"model": name, **row} for name, make in made.items() for row in in_both_types(make())]

    def environment(self) -> Result:
        """Device and versions; on a GPU memory in gigabytes (10^9 bytes), driver, and clocks in MHz."""
        device = torch.device(self.device)
        found: Result = {"device": device_name(device)}
        found |= {"torch": torch.__version__, "transformers": transformers.__version__}
        if device.type == "cuda":
            found["memory_gb"] = round(torch.cuda.get_device_properties(device).total_memory / 1e9, 1)
            found |= nvidia_smi("driver_version", "clocks.sm", "clocks.max.sm", "clocks.mem")
        return found


def nvidia_smi(*names: str) -> dict[str, str]:
    """What the driver says of the first GPU, by name, without units; nothing, where it cannot be asked.

    Args:
        names: of ``nvidia-smi --help-query-gpu``; they are read, nothing is set.
    """
    query = ["nvidia-smi", "--id=0", f"--query-gpu={','.join(names)}", "--format=csv,noheader,nounits"]
    try:
        said = subprocess.run(query, capture_output=True, text=True, timeout=10, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return {}
    return dict(zip(names, (part.strip() for part in said.split(",")), strict=False))


def _guarded(backbone: Backbone) -> Backbone:
    return Backbone(backbone.family, backbone.name)


@dataclass(frozen=True)
class Step:
    """A measurement.

    Attributes:
        share: of the time that is left when it begins, to spend on repeats.
        measure: from the machine and seconds for repeats to figures.
    """

    share: float
    measure: Callable[[Machine, float], Any]


STEPS: dict[str, Step] = {
    "environment": Step(0.0, lambda machine, seconds: machine.environment()),
    "exact": Step(0.0, lambda machine, seconds: machine.exact()),
    "prefill": Step(0.12, lambda machine, seconds: prefill_times(machine.open, seconds)),
    "tokens": Step(0.18, lambda machine, seconds: token_times(machine.open, seconds)),
    "batch-8": Step(0.08, lambda machine, seconds: batch_times(machine.guarded, 8, seconds)),
    "batch-32": Step(0.12, lambda machine, seconds: batch_times(machine.guarded, 32, seconds)),
    "controller-1": Step(0.05, lambda machine, seconds: controller_times(machine.guarded, 1, seconds)),
    "controller-32": Step(0.08, lambda machine, seconds: controller_times(machine.guarded, 32, seconds)),
    "exact-7b": Step(0.0, lambda machine, seconds: exactness(machine.guarded)),
    "launches": Step(0.0, lambda machine, seconds: launches(machine.guarded, (1, 8, 32))),
    "ppo": Step(0.3, lambda machine, seconds: ppo_speed(machine.guarded, seconds)),
    "gumbel": Step(0.4, lambda machine, seconds: gumbel_speed(machine.guarded, seconds)),
}
"""In the order of their value, for time may end."""

LEAST = 3.0
"""Seconds below which no step begins."""


@dataclass
class Gpu:
    """Measure on one GPU what this project claims: exactness, the time of plans, batches, the controller, trainings.

    Models are of LLaVA-1.5-7B's shape with random weights in bfloat16 (14 GB; all steps take up to 80 GB). Each
    step writes its figures, or why it has none, to a file of its own as soon as it is done; with the same --out, steps
    that have figures are not repeated. Prints all figures, and writes them to table.md there.

    Example: python -m maskgym.eval gpu --out results/gpu --seconds 150
    """

    out: Path = Path("results/gpu")
    """Folder to write to."""
    seconds: float = 150.0
    """Time for all steps; what does not fit is left out."""
    device: Literal["cuda", "cpu"] = "cuda"
    """Where to measure; on a CPU the models take hours."""

    def run(self) -> None:
        if not self.seconds > 0:
            raise InputError(f"--seconds is {self.seconds:g}; it must be above 0")
        if self.device == "cuda" and not torch.cuda.is_available():
            raise InputError("there is no CUDA in this process; run it where there is, or give --device cpu")
        check_place(self.out)
        figures = table(measure(Machine(self.device), self.out, self.seconds))
        atomic.write_text(self.out / "table.md", figures + "\n")
        print(figures)


def measure(machine: Machine, out: Path, seconds: float, steps: Mapping[str, Step] = STEPS) -> dict[str, Result]:
    """Take the steps that ``out`` has no figures of, as long as there is time.

    Args:
        machine: measured.
        out: folder of the results, one JSON file a step; made if it is not there.
        seconds: for all steps.
        steps: by name, in order.

    Returns:
        By step: ``figures``, or ``error`` with the end of its ``traceback``, both with ``seconds``, ``peak_memory_mb``
        and, on a GPU, its clock just after, ``clocks.sm`` in MHz; or ``skipped`` and why.
    """
    end = time.perf_counter() + seconds
    _make(out)
    results = {}
    for name, step in steps.items():
        file = out / f"{name}.json"
        results[name] = _done(file) or _taken(step, machine, end - time.perf_counter())
        atomic.write_json(file, results[name])
        print(f"{name}: {_outcome(results[name])}", file=sys.stderr, flush=True)
    return results


def _make(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise atomic.cannot_write(folder, error) from error


def _done(file: Path) -> Result | None:
    """What a step wrote, if it has figures."""
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) and "figures" in found else None


def _taken(step: Step, machine: Machine, left: float) -> Result:
    """A step's result; whatever goes wrong in it, the next ones are to be taken."""
    if left < LEAST:
        return {"skipped": f"{max(0.0, left):.0f} s were left"}
    device = torch.device(machine.device)
    _free(device)
    began = time.perf_counter()
    try:
        result = {"figures": within(left, partial(step.measure, machine, step.share * left))}
    except Exception as error:
        tail = traceback.format_exception(error)[-6:]
        result = {"error": f"{type(error).__name__}: {error}", "traceback": "".join(tail).splitlines()[-12:]}
    taken = {"seconds": round(time.perf_counter() - began, 1), "peak_memory_mb": round(peak_bytes(device) / 1e6)}
    return {**result, **taken, **(nvidia_smi("clocks.sm") if device.type == "cuda" else {})}


def _free(device: torch.device) -> None:
    """Give back what the last step left behind, and forget its peak."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)


def _outcome(result: Result) -> str:
    if "figures" in result:
        return f"{result['seconds']} s, {result['peak_memory_mb']:,} MB at most"
    return f"skipped, {result['skipped']}" if "skipped" in result else result["error"]


def table(results: Mapping[str, Result]) -> str:
    """Markdown: all steps with what became of them, then the figures of each, a row for each measurement."""
    parts = [markdown([("step", "outcome"), *((name, _outcome(result)) for name, result in results.items())])]
    for name, result in results.items():
        if "figures" in result:
            rows = result["figures"] if isinstance(result["figures"], list) else [result["figures"]]
            heads = list(dict.fromkeys(head for row in rows for head in row))
            cells = [[_cell(row.get(head, "")) for head in heads] for row in rows]
            parts.append(f"{name}\n\n{markdown([heads, *cells])}")
    return "\n\n".join(parts)


def _cell(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
