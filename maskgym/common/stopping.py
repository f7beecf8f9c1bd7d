"""SIGINT (Ctrl-C) and SIGTERM: work stops at a safe point, one line says how to go on, the status names the signal."""

from __future__ import annotations

import os
import signal
import subprocess
import threading
from collections.abc import Callable, Sequence
from types import FrameType
from typing import Any

STOPPING = (signal.SIGINT, signal.SIGTERM)


class Stopped(BaseException):
    """A signal asked to stop, and what was worth saving is saved. No ``Exception``, for nothing may swallow it.

    Args:
        number: of the signal.
    """

    def __init__(self, number: int):
        super().__init__(number)
        self.number = number

    def __str__(self) -> str:
        return f"stopped by {signal.Signals(self.number).name}"

    @property
    def status(self) -> int:
        """What shells report of a process that a signal ends: 130 for SIGINT, 143 for SIGTERM."""
        return 128 + self.number


class StopSignals:
    """Hears SIGINT and SIGTERM while the block runs; the second of them ends the process at once.

    Signals belong to the main thread: in another the block runs as if this were not there.

    Args:
        waits: the block looks for itself, at its safe points (``obey``), and at the latest when it ends. Otherwise
            ``Stopped`` is raised wherever it is.
        heard: called with each signal's number.

    Attributes:
        asked: number of the signal that has come, if one has.
    """

    def __init__(self, waits: bool = False, heard: Callable[[int], Any] = lambda number: None):
        self.waits, self.heard = waits, heard
        self.asked: int | None = None
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is threading.main_thread():
            self._before = {each: signal.signal(each, self._hear) for each in STOPPING}
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            self.obey()
        if kind is None or not issubclass(kind, Stopped):
            for each, handler in self._before.items():
                signal.signal(each, handler)

    def obey(self, save: Callable[[], Any] = lambda: None) -> None:
        """A safe point: if a signal has come, save and stop.

        Raises:
            Stopped: so.
        """
        if self.asked is not None:
            save()
            raise Stopped(self.asked)

    def _hear(self, number: int, frame: FrameType | None) -> None:
        self.heard(number)
        if self.asked is not None:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        self.asked = number
        if not self.waits:
            raise Stopped(number)


def run_process(command: Sequence[str]) -> subprocess.CompletedProcess[bytes]:
    """Run a command to its end, its standard error kept; signals to stop are passed on, and it is waited for.

    Raises:
        Stopped: by such a signal.
    """
    started: list[subprocess.Popen[bytes]] = []
    told: list[int] = []

    def tell(number: int) -> None:
        for process in started:
            told.append(number)
            process.send_signal(number)

    # in a group of its own, a Ctrl-C reaches it once, from here, and not a second time from the terminal
    own: Any = {"process_group": 0, "stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE}
    with StopSignals(waits=True, heard=tell) as signals, subprocess.Popen(command, **own) as process:
        started.append(process)
        if signals.asked is not None and not told:  # while it was started
            tell(signals.asked)
        _, errors = process.communicate()
    return subprocess.CompletedProcess(command, process.returncode, None, errors)
