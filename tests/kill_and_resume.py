"""Kills trainings with SIGKILL at random moments, resumes them, and compares them with ones that were never killed.

    python -m tests.kill_and_resume --kills 50

Weights must be equal bit by bit, metrics and results line by line. Each attempt is a process of its own, forked from
one that has imported what trainings import, so that the moments fall into the work.
"""

from __future__ import annotations

import argparse
import importlib
import json
import multiprocessing
import os
import random
import signal
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load_file

from maskgym.eval import cli
from tests.conftest import build, make_dataset

SHARED = "--budgets 0.6 1.0 --test-budgets 0.6 1.0 --batch-size 8"
RL = "--envs 8 --rollout-steps 2 --total-queries 24 --validate-every 12 --checkpoint-every 8"
RELAXED = "--total-queries 256 --validate-every 48 --checkpoint-every 32 --estimator"
TRAININGS = {
    "rl": ("maskgym.training.rl", f"{RL} --reward lagrangian 0.1*log-likelihood"),
    "gumbel": ("maskgym.training.gumbel", f"{RELAXED} gumbel"),
    "soft-topk": ("maskgym.training.gumbel", f"{RELAXED} soft-topk"),
    "adallava-l": ("maskgym.training.gumbel", f"{RELAXED} adallava-l"),
}
"""By name, the script and its options."""


@dataclass(frozen=True)
class Training:
    """One training that can be begun, killed and resumed.

    Attributes:
        script: what trains.
        options: of it.
        out: its run folder.
    """

    script: str
    options: tuple[str, ...]
    out: Path

    def start(self) -> Any:
        """Begin or resume it, in a process of its own."""
        process = forking().Process(
            target=_work, args=(self.script, (*self.options, "--out", str(self.out), "--resume"), self.log)
        )
        process.start()
        return process

    @property
    def log(self) -> Path:
        """What it says."""
        return self.out.with_suffix(".log")

    @property
    def finished(self) -> bool:
        return (self.out / "result.json").is_file()

    def outcome(self) -> tuple[dict[str, bytes], list[Any], Any]:
        """Weights' bytes, lines of metrics, results: all that must be equal."""
        weights = load_file(self.out / "controller.safetensors")
        lines = [json.loads(line) for line in (self.out / "metrics.jsonl").read_text().splitlines()]
        results = json.loads((self.out / "result.json").read_text())
        return {name: value.numpy().tobytes() for name, value in weights.items()}, lines, results


def _work(script: str, arguments: tuple[str, ...], log: Path) -> None:
    said = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for stream in (sys.stdout, sys.stderr):
        os.dup2(said, stream.fileno())
    sys.argv = [script, *arguments]
    cli.run(importlib.import_module(script).main)


def forking() -> Any:
    """Makes processes from one that has imported everything, which takes its time when the first is made."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["maskgym.training.rl", "maskgym.training.gumbel", "matplotlib.pyplot"])
    return context


def warm_up() -> None:
    """Have the imports done, so that they are not timed."""
    first = forking().Process()
    first.start()
    first.join()


def make_place(folder: Path) -> tuple[str, ...]:
    """A small backbone and data to train on; returns the options that name them."""
    backbone = build()
    backbone.model.save_pretrained(folder / "vlm")
    backbone.processor.save_pretrained(folder / "vlm")
    make_dataset(12).save_to_disk(folder / "data")
    return "--backbone", str(folder / "vlm"), "--data", str(folder / "data")


def unkilled(name: str, place: tuple[str, ...], folder: Path) -> tuple[Training, float]:
    """A training that ran to its end, and the seconds that it took."""
    script, options = TRAININGS[name]
    training = Training(script, (*place, *SHARED.split(), *options.split()), folder / name)
    began = time.perf_counter()
    process = training.start()
    process.join()
    assert process.exitcode == 0, training.log.read_text()
    return training, time.perf_counter() - began


def killed(whole: Training, seconds: float, out: Path, kills: int, rng: random.Random) -> int:
    """Train what ``whole`` trained, killed at random moments at most so many times; returns how many there were.

    Raises:
        AssertionError: it did not come to the same end.
    """
    training, survived = Training(whole.script, whole.options, out), 0
    while not training.finished:
        process = training.start()
        if survived < kills:
            process.join(rng.uniform(0, seconds))
            process.kill()
        process.join()
        survived += process.exitcode == -signal.SIGKILL
        assert process.exitcode in (0, -signal.SIGKILL), training.log.read_text()
    for ours, theirs, what in zip(training.outcome(), whole.outcome(), ("weights", "metrics", "results"), strict=True):
        assert ours == theirs, f"{what} of {out} differ after {survived} kills: {_difference(ours, theirs)}"
    return survived


def _difference(ours: Any, theirs: Any) -> str:
    """The first entry that is not equal."""
    if isinstance(ours, dict):
        return next((name for name in theirs if ours.get(name) != theirs[name]), "other names")
    pairs = enumerate(zip(ours, theirs, strict=False))
    return next((f"{at}: {one} is not {two}" for at, (one, two) in pairs if one != two), f"{len(ours)}, {len(theirs)}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50, help="in all")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    options = parser.parse_args()
    rng = random.Random(options.seed)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        place = make_place(folder)
        warm_up()
        wholes = {name: unkilled(name, place, folder) for name in TRAININGS}
        survived, runs = dict.fromkeys(TRAININGS, 0), 0
        while sum(survived.values()) < options.kills:
            name = min(survived, key=lambda each: survived[each])
            left = options.kills - sum(survived.values())
            survived[name] += killed(*wholes[name], folder / f"killed-{runs}", left, rng)
            runs += 1
    each = ", ".join(f"{name} {count}" for name, count in survived.items())
    work = ", ".join(f"{name} {seconds:.1f} s" for name, (_, seconds) in wholes.items())
    print(f"unkilled: {work}")
    print(f"{sum(survived.values())} kills survived ({each}), {runs} trainings ended bit for bit as if never killed")


if __name__ == "__main__":
    main()
