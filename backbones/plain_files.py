"""Files of plain data: reading what anyone may have written, writing where there may be no room."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml
from safetensors import SafetensorError

from backbones.errors import InputError

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


def write_atomically(path: Path, content: bytes) -> None:
    """Write a file so that a crash leaves the old one or the new one, never half of one.

    Raises:
        InputError: a place where it cannot be written.
    """
    temporary = path.with_name(path.name + ".tmp")
    try:
        if path.exists() and not path.is_file():  # /dev/stdout, say, is written to, not put another file in its place
            path.write_bytes(content)
            return
        temporary.write_bytes(content)
        temporary.replace(path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise cannot_write(path, error) from error


def cannot_write(path: Path, error: OSError) -> InputError:
    """What to say of a place that nothing can be written to."""
    return InputError(
        f"{str(path)!r} cannot be written ({error.strerror or error}); make room, or choose another place"
    )


def read_records(file: Path) -> list[dict[str, Any]]:
    """The records in a file: a JSON list of objects.

    Raises:
        InputError: something else.
    """
    try:
        records = read_json(file)
    except (OSError, ValueError) as error:
        raise InputError(f"{str(file)!r} is not readable ({error}); restore or remove it") from error
    if not isinstance(records, list) or not all(isinstance(record, dict) for record in records):
        raise InputError(f"{str(file)!r} must hold a list of records; restore or remove it")
    return records
