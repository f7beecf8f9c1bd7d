"""Cells worked on side by side, each process with its share of the cores."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from typing import Any

import torch

from maskgym.common.errors import InputError
from maskgym.common.stopping import Stopped, StopSignals
from maskgym.eval.experiment.cells import Cell

Prepare = Callable[[], Any]
Work = Callable[[Any, Cell], None]

_prepared: list[Any] = []
_idle = StopSignals(waits=True)


def side_by_side(cells: Sequence[Cell], jobs: int, prepare: Prepare, work: Work) -> Iterator[Cell]:
    """The cells in the order in which they are done; those that need others' runs wait until these are.

    Args:
        cells: of an experiment, not done yet.
        jobs: processes.
        prepare: called once in each process.
        work: called there with what ``prepare`` returned, and a cell.

    Raises:
        InputError: a process that was killed; the others are told to stop, and save.
    """
    arms = [cell.arm for cell in cells]
    waves = [[cell for cell in cells if bool(cell.arm.needs(arms)) == waits] for waits in (False, True)]
    threads = max(1, (os.cpu_count() or 1) // jobs)
    context = multiprocessing.get_context("spawn")
    with (
        ProcessPoolExecutor(jobs, context, _begin, (prepare, threads)) as pool,
        StopSignals(waits=True, heard=_pass_on) as signals,
    ):
        for wave in waves:
            running = {pool.submit(_run, work, cell): cell for cell in wave}
            for done in as_completed(running):
                try:
                    done.result()
                except BrokenProcessPool as error:
                    signals.obey()  # by one, before the process had begun to listen
                    raise InputError(
                        f"a process of --jobs {jobs} was killed, for want of memory, perhaps; what is done is kept: go "
                        "on with the same command, perhaps with fewer --jobs"
                    ) from error
                yield running[done]


def _pass_on(number: int) -> None:
    """Processes are in groups of their own, so this is the only way for a signal to reach them."""
    for process in multiprocessing.active_children():
        process.terminate()


def _begin(prepare: Prepare, threads: int) -> None:
    os.setpgrp()
    _idle.__enter__()
    torch.set_num_threads(threads)
    os.environ["OMP_NUM_THREADS"] = str(threads)  # of the trainings, which are processes of their own
    _prepared.append(prepare())


def _run(work: Work, cell: Cell) -> None:
    _idle.obey()
    try:
        with StopSignals():
            work(_prepared[0], cell)
    except Stopped as stopped:
        _idle.asked = stopped.number  # what waits in the queue is not begun
        raise
