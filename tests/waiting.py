"""A job that does nothing but wait; in a module of its own, for the processes that work on it import it."""

import time


def prepared():
    return None


def waiting(prepared, cell):
    """Says that it has begun, and waits."""
    (cell.folder / f"begun-{cell.seed}").touch()
    time.sleep(60)
