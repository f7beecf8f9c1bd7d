"""The one exception type for bad input."""

from __future__ import annotations

from numbers import Integral


class InputError(ValueError):
    """Something the user passed cannot be used.

    The message is one line that names the value, what was expected, and what to do. The command line
    tools print it to standard error without a traceback and exit with status 2.
    """


def check_count(name: str, value: object) -> None:
    """Refuse what is no number of things.

    Raises:
        InputError: something else than a whole number of at least 1.
    """
    if not isinstance(value, Integral) or value < 1:
        raise InputError(f"{name} is {value!r}; it must be at least 1, and a whole number")
