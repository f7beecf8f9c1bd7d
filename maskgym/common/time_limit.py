"""Calls of a user's own code that may take so long and no longer, by the alarm of the operating system."""

from __future__ import annotations

import math
import signal
import threading
import time
from collections.abc import Callable
from types import FrameType
from typing import Any, TypeVar

from maskgym.common.errors import InputError

Returned = TypeVar("Returned")

AGAIN = 1.0
"""Seconds until the next alarm for code that has swallowed one."""

LONGEST_ALARM = 1e6
"""Seconds; timers do not take any number."""


class Rang(BaseException):
    """Raised wherever the code is when its time is over. No ``Exception``, for code may swallow these.

    Args:
        limit: whose time is over.
    """

    def __init__(self, limit: _Limit):
        super().__init__()
        self.limit = limit


class TimeLimitError(InputError):
    """A call that took too long."""


def check_seconds(name: str, seconds: float) -> None:
    """Refuse what is no limit.

    Raises:
        InputError: something else than a finite number of seconds, at least 0.
    """
    if not isinstance(seconds, int | float) or not 0 <= seconds < math.inf:
        raise InputError(f"{name} is {seconds!r}; give a number of seconds, or 0 for no limit")


def within(seconds: float, call: Callable[[], Returned]) -> Returned:
    """What a call returns, if it does so in time.

    Alarms reach Python in the main thread, where there is ``SIGALRM``: elsewhere, on Windows and in other threads, the
    call has no limit. Native code is interrupted when it returns to Python, or waits for the operating system. An alarm
    that was set before, another limit's, say, rings when it is due, and is set again afterwards.

    Args:
        seconds: the limit; 0: none.
        call: without arguments.

    Raises:
        TimeLimitError: it took longer.
    """
    if not seconds or not _can_ring():
        return call()
    limit = _Limit(seconds)
    try:
        try:
            return call()
        finally:
            limit.running = False
    except Rang as rang:
        if rang.limit is not limit:
            raise
        raise TimeLimitError(f"it did not return within {seconds:g} s") from rang
    finally:  # around the other, for the alarm may ring at its very end
        limit.lift()


def _can_ring() -> bool:
    here = hasattr(signal, "setitimer") and threading.current_thread() is threading.main_thread()
    return here and signal.getsignal(signal.SIGALRM) is not None  # None: set by native code, could not be put back


class _Limit:
    """An alarm over the one that was there before.

    Attributes:
        running: whether the call goes on.
    """

    def __init__(self, seconds: float):
        self.running = True
        remaining, self._every = signal.setitimer(signal.ITIMER_REAL, 0)
        now = time.monotonic()
        self._due, self._due_before = now + seconds, now + remaining if remaining else math.inf
        self._before: Any = signal.signal(signal.SIGALRM, self._ring)
        self._set(self._due)

    def lift(self) -> None:
        """Put back what was there before."""
        self.running = False
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, self._before)
        if self._due_before < math.inf:
            signal.setitimer(signal.ITIMER_REAL, max(1e-6, self._due_before - time.monotonic()), self._every)

    def _set(self, due: float) -> None:
        wait = min(due, self._due_before) - time.monotonic()
        signal.setitimer(signal.ITIMER_REAL, min(LONGEST_ALARM, max(1e-6, wait)))

    def _ring(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if now >= self._due_before:
            self._ring_before(number, frame, now)
        elif now >= self._due and self.running:
            self._due = now + AGAIN
            self._set(self._due)
            raise Rang(self)
        else:
            self._set(self._due)

    def _ring_before(self, number: int, frame: FrameType | None, now: float) -> None:
        """Do what the alarm of before was set to do; it may be set anew there."""
        self._due_before = math.inf
        try:
            if callable(self._before):
                self._before(number, frame)
            elif self._before == signal.SIG_DFL:
                signal.signal(number, signal.SIG_DFL)
                signal.raise_signal(number)
        finally:
            wait = signal.setitimer(signal.ITIMER_REAL, 0)[0] or self._every
            self._due_before = now + wait if wait else math.inf
            self._set(self._due)
