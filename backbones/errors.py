"""The one exception type for bad input, and what it quotes of others."""


class InputError(ValueError):
    """Something the user passed cannot be used.

    The message is one line that names the value, what was expected, and what to do. The command line
    tools print it to standard error without a traceback and exit with status 2.
    """


def first_line(error: Exception) -> str:
    """What an error of somebody else's says, as far as it goes into a message of one line."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
