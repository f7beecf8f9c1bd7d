"""Files of plain data that anyone may have written: JSON, YAML, options, records.

One that is too large is not read, one that nests without end ends nobody's stack, and nothing is waited for.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml
from safetensors import SafetensorError

from backbones.errors import InputError

MALFORMED = (OSError, ValueError, KeyError, IndexError, TypeError, AttributeError, OverflowError, SafetensorError)
"""What reading a file raises, and picking values out of it, where it is not what it should be."""

MOST_BYTES = 64 * 2**20
"""Beyond any JSON that this project writes."""

MOST_OF_OPTIONS = 64 * 2**10
"""Bytes; beyond any file of options."""


def read_json(path: Path) -> Any:
    """The value in a JSON file.

    Raises:
        OSError: no such file, or no right to it.
        ValueError: no regular file, one that is too large, or no JSON.
    """
    return parse_json(_content(path, MOST_BYTES))


def parse_json(text: str | bytes) -> Any:
    """The value that a JSON text stands for.

    Raises:
        ValueError: something else, or values nested deeper than can be read.
    """
    try:
        return json.loads(text)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error
    except UnicodeDecodeError as error:  # which shows all that it could not decode
        raise ValueError("no text") from error


def read_config(path: Path) -> dict[Any, Any]:
    """Options by name from a YAML file.

    Raises:
        InputError: no such file, or one that is no mapping.
    """
    try:
        fields = _read_yaml(path)
    except FileNotFoundError as error:
        raise InputError(f"config {str(path)!r} does not exist; name a YAML file of options") from error
    except (OSError, ValueError) as error:
        raise InputError(f"config {str(path)!r} is not readable YAML ({error}); mend it, or name another") from error
    if not isinstance(fields, dict):
        raise InputError(f"config {str(path)!r} must hold a mapping of options, as in `seed: 1`")
    return fields


def read_records(path: Path) -> list[dict[str, Any]]:
    """The records in a file: a JSON list of objects.

    Raises:
        InputError: something else.
    """
    try:
        records = read_json(path)
    except (OSError, ValueError) as error:
        raise InputError(f"{str(path)!r} is not readable ({error}); restore or remove it") from error
    if not isinstance(records, list) or not all(isinstance(record, dict) for record in records):
        raise InputError(f"{str(path)!r} must hold a list of records; restore or remove it")
    return records


def _read_yaml(path: Path) -> Any:
    """The value in a YAML file of some lines.

    Raises:
        OSError: no such file, or no right to it.
        ValueError: no regular file, one that is too large, no YAML, or one that does not stand for plain data: without
            aliases, which make a few lines stand for more than any memory holds.
    """
    try:
        text = _content(path, MOST_OF_OPTIONS).decode()
        if any(isinstance(token, yaml.AliasToken) for token in yaml.scan(text)):
            raise ValueError("it has YAML aliases: write each option out")
        return yaml.safe_load(text)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error
    except UnicodeDecodeError as error:
        raise ValueError("no text") from error
    except (yaml.YAMLError, TypeError, AttributeError, LookupError, OverflowError) as error:  # its constructors' own
        raise ValueError(" ".join(str(error).split())) from error


def _content(path: Path, most_bytes: int) -> bytes:
    if path.exists() and not path.is_file():
        raise ValueError(f"{path.name} is no regular file")
    with path.open("rb") as file:
        content = file.read(most_bytes + 1)
    if len(content) > most_bytes:
        limit = f"{most_bytes >> 20} MB" if most_bytes >> 20 else f"{most_bytes >> 10} kB"
        raise ValueError(f"{path.name} has more than {limit}")
    return content
