"""Files of plain data that anyone may have written: JSON, YAML, options, records, columns of numbers.

One that is too large is not read, one that nests without end ends nobody's stack, and nothing is waited for.
"""

from __future__ import annotations

import json
import zlib
from io import BytesIO
from pathlib import Path
from typing import Any
from zipfile import ZIP_DEFLATED, ZIP_STORED, BadZipFile, ZipFile

import numpy as np
import yaml
from safetensors import SafetensorError

from maskgym.common.errors import InputError

MALFORMED = (OSError, ValueError, KeyError, IndexError, TypeError, AttributeError, OverflowError, SafetensorError)
"""What reading a file raises, and picking values out of it, where it is not what it should be."""

MOST_BYTES = 64 * 2**20
"""Beyond any JSON that this project writes."""

MOST_OF_OPTIONS = 64 * 2**10
"""Bytes; beyond any file of options."""


NUMBERS = (
    *("budget", "budget_ms", "predicted_ms", "keep", "n", "accuracy", "accuracy_stderr", "llm_flops_ratio"),
    *("total_flops_ratio", "budget_violations", "kept_tokens", "kept_heads", "kept_layers", "ttft_ms_p50"),
    "tpot_ms_p50",
)
"""Fields of records that tables and pictures take for numbers."""


def is_number(value: Any) -> bool:
    """Whether a value of a JSON file can be calculated with."""
    whole = isinstance(value, int) and not isinstance(value, bool) and abs(value) < 2**63
    return whole or isinstance(value, float)


def check_regular(path: Path) -> None:
    """Refuse what would be waited for, or has no end.

    Raises:
        ValueError: something that is there and is no regular file.
    """
    if path.exists() and not path.is_file():
        raise ValueError(f"{path.name} is no regular file")


def check_inside(path: Path, folder: Path) -> None:
    """Refuse a link that leads out of a folder, which may be somebody else's. What the hub's cache holds of a
    repository are links to its blobs, and these are taken.

    Raises:
        InputError: saying where it leads.
    """
    real, home = path.resolve(), folder.resolve()
    blobs = home.parents[1] / "blobs" if home.parent.name == "snapshots" else home
    if not real.is_relative_to(home) and real.parent != blobs:
        raise InputError(
            f"{str(path)!r} is a link out of its folder, to {str(real)!r}; put the file itself there, or remove it"
        )


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
        InputError: something else, a link out of its folder, or a record with no number where one belongs.
    """
    check_inside(path, path.parent)
    try:
        records = read_json(path)
    except (OSError, ValueError) as error:
        raise InputError(f"{str(path)!r} is not readable ({error}); restore or remove it") from error
    if not isinstance(records, list) or not all(isinstance(record, dict) for record in records):
        raise InputError(f"{str(path)!r} must hold a list of records; restore or remove it")
    for number, record in enumerate(records, 1):
        odd = [name for name in NUMBERS if name in record and not is_number(record[name])]
        if odd:
            raise InputError(
                f"{str(path)!r}, record {number}: {odd[0]} is {record[odd[0]]!r:.40}; it must be a number; restore or "
                "remove the file"
            )
    return records


def read_columns(path: Path) -> dict[str, np.ndarray]:
    """The arrays in an ``npz`` file, each one axis of floating-point numbers. What a file only claims takes no memory:
    each array's header is held against what the file has for it.

    Raises:
        OSError: no such file, or no right to it.
        ValueError: no regular file, one that is too large or unpacks to too much, or something else in it.
    """
    try:
        with ZipFile(BytesIO(_content(path, MOST_BYTES))) as packed:
            members = packed.infolist()
            if sum(member.file_size for member in members) > MOST_BYTES:
                raise ValueError(f"{path.name} unpacks to more than {MOST_BYTES >> 20} MB")
            if not {member.compress_type for member in members} <= {ZIP_STORED, ZIP_DEFLATED}:
                raise ValueError(f"{path.name} is packed in a way that is not NumPy's")
            return {member.filename.removesuffix(".npy"): _column(packed, member.filename) for member in members}
    except (BadZipFile, zlib.error, EOFError, RuntimeError, NotImplementedError, SyntaxError) as error:
        raise ValueError(str(error) or type(error).__name__) from error


def _column(packed: ZipFile, name: str) -> np.ndarray:
    with packed.open(name) as file:
        version = np.lib.format.read_magic(file)
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, _, dtype = read(file)
        content = file.read()
    if len(shape) != 1 or dtype.kind != "f" or shape[0] * dtype.itemsize != len(content):
        raise ValueError(f"{name} holds {dtype} of shape {shape} in {len(content)} bytes, not a column of numbers")
    return np.frombuffer(content, dtype)


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
    check_regular(path)
    with path.open("rb") as file:
        content = file.read(most_bytes + 1)
    if len(content) > most_bytes:
        limit = f"{most_bytes >> 20} MB" if most_bytes >> 20 else f"{most_bytes >> 10} kB"
        raise ValueError(f"{path.name} has more than {limit}")
    return content
