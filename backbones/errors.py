"""The one exception type for bad input."""


class InputError(ValueError):
    """Something the user passed cannot be used.

    The message is one line that names the value, what was expected, and what to do. The command line
    tools print it to standard error without a traceback and exit with status 2.
    """
