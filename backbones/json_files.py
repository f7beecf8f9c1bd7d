"""JSON files that somebody else may have written."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

MOST_BYTES = 64 * 2**20
"""Beyond any file that this project writes."""


def read_json(path: Path, most_bytes: int = MOST_BYTES) -> Any:
    """What a JSON file holds; one that is too large is not read, one that nests without end ends nobody's stack.

    Args:
        path: of the file.
        most_bytes: a larger one is refused.

    Raises:
        OSError: no such file, or no right to it.
        ValueError: no regular file, too large, nested too deeply, or no JSON.
    """
    if path.exists() and not path.is_file():
        raise ValueError(f"{path.name} is no regular file")
    with path.open("rb") as file:
        content = file.read(most_bytes + 1)
    if len(content) > most_bytes:
        raise ValueError(f"{path.name} has more than {most_bytes / 1e6:.0f} MB")
    try:
        return json.loads(content)
    except RecursionError:
        raise ValueError(f"{path.name} is nested too deeply") from None
    except UnicodeDecodeError:  # which shows all that it could not decode
        raise ValueError(f"{path.name} is no text") from None
