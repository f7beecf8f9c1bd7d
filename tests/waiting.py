"""Jobs that do nothing but wait, or die; in a module of its own, for the processes that work on it import it."""

import os
import signal
import time


def prepared():
    return None


def waiting(prepared, cell):
    """Says that it has begun, and waits."""
    (cell.folder / f"begun-{cell.seed}").touch()
    time.sleep(60)


def dying(prepared, cell):
    """Does the first cell, and is then killed, as by a system that has run out of memory."""
    if cell.seed:
        while not (cell.folder / "done-0").exists():
            time.sleep(0.01)
        time.sleep(0.2)
        os.kill(os.getpid(), signal.SIGKILL)
    (cell.folder / "done-0").touch()


def doing(prepared, cell):
    (cell.folder / f"done-{cell.seed}").touch()
