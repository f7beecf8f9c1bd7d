"""What the cells of a table say, as texts, whatever type ``datasets`` gives their column.

Texts stay where they are, on disk where a table is memory-mapped; of other types the texts are made once.
"""

from __future__ import annotations

import json
import reprlib
from collections.abc import Callable, Iterable
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

LONGEST_SHOWN = 80
"""Characters of a cell that a message quotes."""

ANSWER = "answer"
"""Where annotators' answers are mappings, the field with the answer's text, as in VQAv2."""

TRUTH = "a truth value has no one spelling: write the word that is meant (yes, true, ...)"


class Unreadable(ValueError):
    """A cell that is no text.

    Args:
        row: of the cell.
        reason: what it must be.
    """

    def __init__(self, row: int, reason: str):
        super().__init__(reason)
        self.row, self.reason = row, reason


def texts(column: pa.ChunkedArray, feature: Any) -> pa.ChunkedArray:
    """The text of each cell, (rows,) strings, null where it is missing.

    A text says itself, a number what a person would write (3 for 3.0), a label its name, a date ``2020-01-31``, a
    moment ``2020-01-31 10:20:00``, a decimal all its digits, and what JSON Lines mix, what stands there.

    Args:
        column: as ``datasets`` stores it.
        feature: its type in ``datasets``.

    Raises:
        Unreadable: a cell of another type, or one whose text cannot be known: a truth value, a number that is not
            finite or has more digits than were kept.
    """
    return _by_chunk(column, feature, _texts, pa.string())


def lists(column: pa.ChunkedArray, feature: Any) -> pa.ChunkedArray:
    """The texts of each cell, (rows,) lists of strings, null where it is missing: of a list those of its items, of
    mappings those of the field ``answer``, of a single value its text alone. A text that begins with ``[`` is taken for
    a list in JSON, as tables without lists hold them.

    Raises:
        Unreadable: as ``texts``, or a text that begins with ``[`` and is no JSON.
    """
    return _by_chunk(column, feature, _lists, pa.list_(pa.string()))


def shown(cell: Any) -> str:
    """A cell as a message quotes it: short, and no bytes."""
    if isinstance(cell, bytes):
        return f"{len(cell):,} bytes"
    quoted = _SHORT.repr(cell)
    return quoted if len(quoted) <= LONGEST_SHOWN else f"{quoted[:LONGEST_SHOWN]}…"


_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = LONGEST_SHOWN


def said(value: Any) -> str | None:
    """The text of a single value; None where it is missing.

    Raises:
        ValueError: a value that is no text, or whose text cannot be known.
    """
    if value is None or isinstance(value, str):
        return value
    if isinstance(value, bool):
        raise ValueError(TRUTH)
    if isinstance(value, int):
        return str(value)
    if isinstance(value, float | np.floating):
        return _number(value)
    raise ValueError("it must be a text or a number")


def _number(value: float | np.floating) -> str | None:
    if np.isnan(value):
        return None
    if not np.isfinite(value):
        raise ValueError("it must be a finite number")
    if value == int(value):
        if abs(float(value)) > 2.0 ** (np.finfo(np.asarray(value).dtype).nmant + 1):
            raise ValueError("it has more digits than a float keeps: write it as a text")
        return str(int(value))
    return np.format_float_positional(value, trim="-")


def _by_chunk(
    column: pa.ChunkedArray, feature: Any, read: Callable[[pa.Array, Any], pa.Array], type: pa.DataType
) -> pa.ChunkedArray:
    chunks, rows = [], 0
    whole = "time" in str(column.type)  # how moments are written depends on all of them
    for chunk in [column.combine_chunks()] if whole else column.chunks:
        try:
            chunks.append(read(chunk, feature))
        except Unreadable as error:
            raise Unreadable(rows + error.row, error.reason) from error
        rows += len(chunk)
    if len({str(chunk.type) for chunk in chunks}) > 1:  # some of a column in JSON, say, has no cell
        chunks = [chunk.cast(type) for chunk in chunks]
    return pa.chunked_array(chunks, chunks[0].type if chunks else type)


def _texts(array: pa.Array, feature: Any) -> pa.Array:
    kind = array.type
    if is_text(kind):
        return array
    if pa.types.is_dictionary(kind):
        return _texts(array.dictionary_decode(), feature)
    if isinstance(feature, datasets.ClassLabel):
        return _each(array, lambda label: None if label is None or label < 0 else feature.int2str(label))
    if pa.types.is_floating(kind):
        width = kind.to_pandas_dtype()
        return _each(array, lambda value: None if value is None else _number(width(value)))
    if pa.types.is_integer(kind) or pa.types.is_decimal(kind) or pa.types.is_null(kind):
        return array.cast(pa.string())
    if pa.types.is_date(kind) or pa.types.is_time(kind) or pa.types.is_timestamp(kind):
        return _moments(array)
    if isinstance(kind, pa.JsonType):
        return _each(array, lambda text: said(_parsed(text)))
    return _each(array, said)


def _lists(array: pa.Array, feature: Any) -> pa.Array:
    kind = array.type
    if _is_list(kind):
        return _listed(array, feature)
    if pa.types.is_struct(kind) and kind.get_field_index(ANSWER) >= 0:
        return _lists(pc.struct_field(array, ANSWER), _inner(feature, ANSWER))
    if isinstance(kind, pa.JsonType):
        return _each(array, lambda text: _all_said(_parsed(text)), pa.list_(pa.string()))
    single = _texts(array, feature)
    if pc.any(
        pc.starts_with(single.cast(pa.string()) if pa.types.is_string_view(single.type) else single, "[")
    ).as_py():
        return _each(single, _in_json, pa.list_(pa.string()))
    return _in_lists(single, np.arange(len(single) + 1), single)


def _listed(array: pa.Array, feature: Any) -> pa.Array:
    """Of an array of lists."""
    kind, inner = array.type.value_type, _inner(feature)
    if is_text(kind):
        return array
    lengths = pc.fill_null(pc.list_value_length(array), 0).to_numpy()
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    items = array.flatten()
    if pa.types.is_struct(kind) and kind.get_field_index(ANSWER) >= 0:
        items, inner = pc.struct_field(items, ANSWER), _inner(inner, ANSWER)
    try:
        items = _each(items, _of_one) if isinstance(items.type, pa.JsonType) else _texts(items, inner)
    except Unreadable as error:
        row = int(np.searchsorted(offsets, error.row, side="right")) - 1
        raise Unreadable(row, error.reason) from error
    return _in_lists(items, offsets, array)


def _in_lists(items: pa.Array, offsets: np.ndarray, like: pa.Array) -> pa.Array:
    """Lists of consecutive items, missing where they are in another array."""
    return pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), items, mask=like.is_null())


def _of_one(text: str | None) -> str | None:
    """Of an item of a list in JSON."""
    value = _parsed(text)
    return said(value[ANSWER] if isinstance(value, dict) and ANSWER in value else value)


def _all_said(value: Any) -> list[str | None] | None:
    """Of a value in JSON, or of a list of them."""
    if value is None:
        return None
    if isinstance(value, dict) and ANSWER in value:
        return _all_said(value[ANSWER])
    items = value if isinstance(value, list) else [value]
    return [said(item[ANSWER] if isinstance(item, dict) and ANSWER in item else item) for item in items]


def _in_json(text: str | None) -> list[str | None] | None:
    """Of a text that may be a list written down."""
    if text is None or not text.startswith("["):
        return None if text is None else [text]
    try:
        value = _parsed(text)
    except ValueError as error:
        raise ValueError('it looks like a list, and is not JSON: write ["red", "dark red"]') from error
    return _all_said(value)


def _parsed(text: str | None) -> Any:
    """A value in JSON, its numbers as they stand there."""
    return None if text is None else json.loads(text, parse_float=str, parse_int=str)


def _moments(array: pa.Array) -> pa.Array:
    """Dates and times in ISO 8601, without what is zero in all of them: fractions of a second, and the time of day."""
    kind = array.type
    if pa.types.is_timestamp(kind) and kind.tz is None and _fits(array, pa.date32()):
        return array.cast(pa.date32()).cast(pa.string())
    whole = pa.timestamp("s", kind.tz) if pa.types.is_timestamp(kind) else pa.time32("s")
    return (array.cast(whole) if not pa.types.is_date(kind) and _fits(array, whole) else array).cast(pa.string())


def _fits(array: pa.Array, kind: pa.DataType) -> bool:
    """Whether all that cells say is left in another type; Arrow itself drops a time of day without a word."""
    try:
        return bool(array.cast(kind).cast(array.type).equals(array))
    except pa.ArrowInvalid:
        return False


def _each(array: pa.Array, read: Callable[[Any], Any], type: pa.DataType | None = None) -> pa.Array:
    """What is read of each cell.

    Raises:
        Unreadable: for the first one that ``read`` refuses.
    """

    def all_read() -> Iterable[Any]:
        for row, cell in enumerate(array):
            try:
                yield read(cell.as_py())
            except (ValueError, RecursionError) as error:
                raise Unreadable(row, str(error)) from error

    return pa.array(list(all_read()), type or pa.string())


def is_text(kind: pa.DataType) -> bool:
    """Whether cells of an Arrow type are strings."""
    return pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)


def _is_list(kind: pa.DataType) -> bool:
    large = pa.types.is_large_list(kind) or pa.types.is_large_list_view(kind)
    return large or pa.types.is_list(kind) or pa.types.is_list_view(kind) or pa.types.is_fixed_size_list(kind)


def _inner(feature: Any, field: str = "") -> Any:
    """The type in ``datasets`` of a list's items, or of a mapping's field; None where it is not told."""
    if field:
        return feature.get(field) if isinstance(feature, dict) else None
    return getattr(feature, "feature", None)
