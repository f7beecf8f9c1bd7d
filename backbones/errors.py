"""The one exception type for bad input, and what it quotes of others."""

from __future__ import annotations

from collections.abc import Sequence


class InputError(ValueError):
    """Something the user passed cannot be used.

    The message is one line that names the value, what was expected, and what to do. The command line
    tools print it to standard error without a traceback and exit with status 2.
    """


def first_line(error: Exception) -> str:
    """What an error of somebody else's says, as far as it goes into a message of one line."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def queries_named(ids: Sequence[str]) -> str:
    """The first of some query ids, for a message."""
    shown = ", ".join(ids[:3])
    return f"queries {shown}{', …' if len(ids) > 3 else ''}" if ids else "no query ids known"
