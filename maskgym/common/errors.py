"""The one exception type for bad input, and what its messages quote and say alike."""

from __future__ import annotations

import signal
import threading
from collections.abc import Sequence
from numbers import Integral
from typing import Any


class InputError(ValueError):
    """Something the user passed cannot be used.

    The message is one line that names the value, what was expected, and what to do. The command line
    tools print it to standard error without a traceback and exit with status 2.
    """


def first_line(error: Exception) -> str:
    """What an error of somebody else's says, as far as it goes into a message of one line: below a heading, if any."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    return lines[1] if lines[0].endswith(":") and len(lines) > 1 else lines[0]


def printable(text: str) -> str:
    """A text of somebody's as one line that no terminal acts on: without ends of lines, control characters escaped."""
    line = " ".join(text.split())
    return line if line.isprintable() else "".join(each if each.isprintable() else _escaped(each) for each in line)


def _escaped(character: str) -> str:
    return character.encode("unicode_escape").decode()


def was_interrupted(error: BaseException) -> bool:
    """Whether an error that somebody's code ended with is the user's Ctrl-C, which is no fault of that code."""
    if not isinstance(error, KeyboardInterrupt) or threading.current_thread() is not threading.main_thread():
        return False
    return signal.getsignal(signal.SIGINT) is signal.default_int_handler  # commands hear it in another way


def query_named(ids: Sequence[str] | None, row: int) -> str:
    """A query of a batch, for a message: by its id, where the batch has ids."""
    return f"query {ids[row]!r}" if ids else f"the query at row {row}"


def queries_named(ids: Sequence[str]) -> str:
    """The first of some query ids, for a message."""
    shown = ", ".join(ids[:3])
    return f"queries {shown}{', …' if len(ids) > 3 else ''}" if ids else "no query ids known"


def as_python(value: Any) -> Any:
    """A number of NumPy's or torch's as Python has it, an array of them as lists; anything else as it is."""
    return value.tolist() if hasattr(value, "tolist") else value


def check_count(name: str, value: object) -> None:
    """Refuse what is no number of things.

    Raises:
        InputError: something else than a whole number of at least 1.
    """
    if not isinstance(value, Integral) or value < 1:
        raise InputError(f"{name} is {value!r}; it must be at least 1, and a whole number")
