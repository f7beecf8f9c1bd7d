"""Reading files that anyone may have written: YAML and JSON, and what goes wrong with them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml
from safetensors import SafetensorError

MALFORMED = (OSError, ValueError, KeyError, IndexError, TypeError, AttributeError, OverflowError, SafetensorError)
"""What reading a file raises, and picking values out of it, where it is not what it should be."""


def read_json(path: Path) -> Any:
    """The value in a JSON file.

    Raises:
        OSError: a file that cannot be read.
        ValueError: one that is no JSON.
    """
    return parse_json(path.read_text(encoding="utf-8"))


def parse_json(text: str) -> Any:
    """The value that a JSON text stands for.

    Raises:
        ValueError: something else, or values nested deeper than can be read.
    """
    try:
        return json.loads(text)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error


def read_yaml(path: Path) -> Any:
    """The value in a YAML file.

    Raises:
        OSError: a file that cannot be read.
        ValueError: one that is no YAML, or does not stand for plain data.
    """
    try:
        return yaml.safe_load(path.read_text(encoding="utf-8"))
    except RecursionError as error:
        raise ValueError("nested too deeply") from error
    except (yaml.YAMLError, TypeError, AttributeError, LookupError, OverflowError) as error:  # its constructors' own
        raise ValueError(" ".join(str(error).split())) from error
