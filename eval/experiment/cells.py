"""The cells of an experiment, one for each arm and seed: trained and evaluated if they are not there yet."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np

from maskgym.backbones import Backbone, EncodingBank
from maskgym.common.atomic import write_atomically, write_json, write_text
from maskgym.common.errors import InputError, first_line, printable
from maskgym.common.plain_files import check_inside, is_number, read_columns, read_records
from maskgym.common.run_folder import COMMAND, RunFolder
from maskgym.common.stopping import run_process
from maskgym.eval.experiment.arms import Arm
from maskgym.eval.measure.evaluate import Record, outcomes_met
from maskgym.eval.measure.timing import add_timing, first_queries
from maskgym.eval.policies import load_planner

RECORDS, OUTCOMES, FAILURE = "records.json", "outcomes.npz", "failure.txt"
KEPT_COLUMNS = ("accuracy", "llm_flops_ratio")
"""What is kept of every single query."""

MEASURED = (
    *("budget", "n", "accuracy", "accuracy_stderr", "llm_flops_ratio", "total_flops_ratio", "budget_violations"),
    *("kept_tokens", "kept_heads", "kept_layers"),
)
"""Numbers of every record but a gap's."""

TIME = "ttft_ms_p50"
"""What a record has besides once single queries were timed: median time to first token, in ms."""

LONGEST_TEXT = 10_000
"""Characters; beyond any reason or command."""


@dataclass(frozen=True)
class Cell:
    """One arm with one seed.

    Attributes:
        arm: what is trained and evaluated.
        seed: of both.
        folder: where its files are.
    """

    arm: Arm
    seed: int
    folder: Path

    @property
    def run(self) -> Path:
        """The folder of its training."""
        return self.folder / "run"

    @property
    def done(self) -> bool:
        return (self.folder / RECORDS).is_file()

    @property
    def timed(self) -> bool:
        """Whether single queries were timed at every budget that it meets."""
        return self.done and all("gap" in record or TIME in record for record in self.records())

    @property
    def trained(self) -> bool:
        return (self.run / "result.json").is_file()

    def records(self) -> list[Record]:
        """What was measured, a record a budget; a budget that it cannot meet has a ``gap`` that says why.

        Raises:
            InputError: an unreadable file, or a record that lacks what tables are made of.
        """
        file = self.folder / RECORDS
        records = read_records(file)
        odd = [f", record {number}: {why}" for number, record in enumerate(records, 1) if (why := _lacks(record))]
        if len(records) > 1 and not all(record.get("budgeted", True) for record in records):
            odd.append(f": a policy without budgets has one record, not {len(records)}")
        if odd:
            raise InputError(f"{str(file)!r}{odd[0]}; remove the file to measure that cell again")
        return records

    def outcomes(self) -> dict[str, np.ndarray]:
        """``accuracy@BUDGET`` and ``llm_flops_ratio@BUDGET``, each (queries,).

        Raises:
            InputError: an unreadable file.
        """
        try:
            check_inside(self.folder / OUTCOMES, self.folder)
            columns = read_columns(self.folder / OUTCOMES)
            for record in self.records():
                for name in KEPT_COLUMNS if "gap" not in record else ():
                    column = columns.get(f"{name}@{record['budget']:g}", np.empty(0))
                    if len(column) != record["n"] or not np.isfinite(column).all():
                        raise ValueError(f"{name} at {record['budget']:g} is not {record['n']} finite numbers")
        except (OSError, ValueError) as error:
            if isinstance(error, InputError):
                raise
            raise InputError(
                f"{str(self.folder / OUTCOMES)!r} cannot be read ({first_line(error)}); remove "
                f"{str(self.folder / RECORDS)!r} to measure that cell again"
            ) from error
        return columns

    def failure(self) -> str | None:
        """Why it could not be measured, if it could not."""
        why = self._said(self.folder / FAILURE)
        return why and printable(why)

    def command(self) -> str | None:
        """The command of its training, if it had one."""
        return self._said(self.run / COMMAND)

    def _said(self, file: Path) -> str | None:
        """The beginning of a text file, if there is one.

        Raises:
            InputError: a link out of the cell's folder.
        """
        check_inside(file, self.folder)
        if not file.is_file():
            return None
        with file.open(encoding="utf-8", errors="replace") as opened:
            return opened.read(LONGEST_TEXT).strip()


def _lacks(record: Record) -> str | None:
    """What a record of a cell has not, or has otherwise than it should."""
    if "gap" in record:
        needed: Sequence[str] = ("budget",)
    else:
        needed = MEASURED
    for name in needed:
        if not is_number(record.get(name)) or not math.isfinite(record[name]):
            return f"{name} is {record.get(name)!r:.40}, not a finite number"
    if not isinstance(record.get("gap", ""), str):
        return f"gap is {record['gap']!r:.40}, not a text"
    if "gap" not in record and not isinstance(record.get("budgeted"), bool):
        return f"budgeted is {record.get('budgeted')!r:.40}, not true or false"
    return None


def lay_out(folder: Path, arms: Sequence[Arm], seeds: Sequence[int]) -> list[Cell]:
    """The cells of an experiment, those that others need first."""
    ordered = sorted(arms, key=lambda arm: len(arm.needs(arms)))
    return [
        Cell(arm, seed, folder / "cells" / arm.name.replace(" ", "-").replace(",", "") / f"seed-{seed}")
        for seed in seeds
        for arm in ordered
        if arm.seeded or seed == seeds[0]
    ]


def fill(text: str, cell: Cell, cells: Sequence[Cell]) -> str:
    """A policy or option with the folders of runs in place of their stand-ins."""
    runs = {other.arm.name: str(other.run) for other in cells if other.seed == cell.seed}
    for name, run in runs.items():
        text = text.replace(f"{{{name}}}", run)
    return text.replace("{}", str(cell.run))


def train(cell: Cell, cells: Sequence[Cell], shared: Sequence[str]) -> None:
    """Train the cell's run in a process of its own, or finish it.

    Args:
        cell: with a script.
        cells: of the experiment, for runs that it starts from.
        shared: options that all trainings of the experiment have.

    Raises:
        RuntimeError: a training that ends with an error; the message is its last line.
        Stopped: by a signal, which the training heard, too.
    """
    options = [fill(option, cell, cells) for option in cell.arm.options]
    again = ["--resume"] if RunFolder(cell.run).is_run() else []
    command = [sys.executable, "-m", "maskgym", str(cell.arm.script), *options, *shared, *again]
    cell.folder.mkdir(parents=True, exist_ok=True)
    done = run_process([*command, "--seed", str(cell.seed), "--out", str(cell.run)])
    if done.returncode:
        lines = done.stderr.decode(errors="replace").strip().splitlines() or [f"status {done.returncode}"]
        raise RuntimeError(lines[-1].removeprefix("error: "))


def measure(
    cell: Cell,
    cells: Sequence[Cell],
    backbone: Backbone,
    bank: EncodingBank,
    budgets: Sequence[float],
    max_new_tokens: int | None = None,
) -> None:
    """Evaluate the cell's policy, budget by budget, and write what it did.

    Args:
        cell: trained, if it has to be.
        cells: of the experiment, for policies that use other runs.
        backbone: answers.
        bank: the test queries.
        budgets: shares of the full plan's LLM FLOPs.
        max_new_tokens: as in ``outcomes``.
    """
    planner = load_planner(fill(cell.arm.policy, cell, cells), backbone, cell.seed)
    records: list[Record] = []
    columns: dict[str, np.ndarray] = {}
    head: Record = {"arm": cell.arm.name, "seed": cell.seed}
    how: dict[str, Any] = {"max_new_tokens": max_new_tokens, "progress": False}
    found, gaps = outcomes_met(planner, backbone, bank, budgets, cell.seed, **how)
    for outcome in found:
        records.append({**outcome.record, **head, "budgeted": planner.budgeted})
        for name in KEPT_COLUMNS:
            columns[f"{name}@{outcome.record['budget']:g}"] = outcome.columns[name].astype(np.float32)
    records += [{**head, "budget": budget, "gap": reason} for budget, reason in gaps.items()]
    cell.folder.mkdir(parents=True, exist_ok=True)
    packed = BytesIO()
    np.savez_compressed(packed, allow_pickle=False, **columns)
    write_atomically(cell.folder / OUTCOMES, packed.getvalue())
    write_json(cell.folder / RECORDS, records)


def measure_times(cell: Cell, cells: Sequence[Cell], backbone: Backbone, bank: EncodingBank, count: int) -> None:
    """Put times of single queries into the records of a cell that is done.

    Args:
        cell: measured.
        cells: of the experiment, for policies that use other runs.
        backbone: answers.
        bank: the test queries.
        count: how many to time, one by one.
    """
    planner = load_planner(fill(cell.arm.policy, cell, cells), backbone, cell.seed)
    records = cell.records()
    met = [record for record in records if "gap" not in record]
    add_timing(planner, backbone, first_queries(bank, count), met)
    write_json(cell.folder / RECORDS, records)


def attempt(cell: Cell, work: Any) -> bool:
    """Do some work for a cell; a failure is written down, for the other cells to go on."""
    cell.folder.mkdir(parents=True, exist_ok=True)
    try:
        work()
    except Exception as error:  # whatever it is, it is this cell's, and the report shows it
        write_text(cell.folder / FAILURE, f"{type(error).__name__}: {error}\n")
        return False
    # last, since a call beside this one may have failed for no more than finding the cell taken
    (cell.folder / FAILURE).unlink(missing_ok=True)
    return True
