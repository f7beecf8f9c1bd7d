"""The columns that queries are made of: as Arrow stores them, read, and alike in several data sets."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.compute as pc

from maskgym.common.errors import InputError
from maskgym.envs.data.cells import Unreadable, lists, shown, texts
from maskgym.envs.data.pictures import IMAGES, Pictures

COLUMNS = ("image", "question", "answers")
OPTIONAL = ("beside", "scoring", "choices", "group")
TEXTS = ("id", "question", "answers", "type", "scoring", "choices", "group")
LISTS = ("answers", "choices")
NEEDED = ("id", "question", "answers")
"""Of the columns that there are; cells of the others may be missing."""


def checked(dataset: Any, name: str) -> datasets.Dataset:
    """A data set whose rows can be picked, with a column ``answer`` called ``answers``.

    Raises:
        InputError: a stream, several splits, or something else.
    """
    if isinstance(dataset, datasets.IterableDataset | datasets.IterableDatasetDict):
        raise InputError(f"data {name!r} is a stream, whose rows cannot be picked; load it without streaming=True")
    if isinstance(dataset, datasets.DatasetDict):
        raise InputError(f"data {name!r} has the splits {', '.join(dataset)}; give one of them, as in data['test']")
    if not isinstance(dataset, datasets.Dataset):
        raise InputError(f"data {name!r} is of type {type(dataset).__name__}; it must be a datasets.Dataset")
    there = dataset.column_names
    return dataset.rename_column("answer", "answers") if "answer" in there and "answers" not in there else dataset


def stored(dataset: datasets.Dataset, names: Sequence[str]) -> Iterator[tuple[str, pa.ChunkedArray, Any]]:
    """Of each column its name, its cells as Arrow has them, and its type in ``datasets``. They are on disk where the
    data set is memory-mapped: a cell is read in microseconds, where a ``datasets.Dataset`` takes tens."""
    table = dataset.select_columns(list(names)).with_format("arrow")[:]
    return ((name, table.column(name), dataset.features[name]) for name in names)


def read(cells: pa.ChunkedArray, feature: Any, data: str, name: str) -> pa.ChunkedArray:
    """A column's texts, or lists of texts.

    Args:
        cells: as they are stored.
        feature: their type in ``datasets``.
        data: name of the data set.
        name: of the column.

    Raises:
        InputError: a cell that cannot be read, or that must not be missing; the message names its row.
    """
    try:
        if name not in LISTS:
            column = texts(cells, feature)
            _refuse(pc.is_null(column), name in NEEDED, "it must be a text")
            return column
        column = lists(cells, feature)
        short = pc.fill_null(pc.equal(pc.list_value_length(column), 0), True)
        _refuse(short, name in NEEDED, "it must be a list of texts, at least one")
        if pc.list_flatten(column).null_count:
            hole = next(row for row, cell in enumerate(column) if cell.is_valid and None in cell.as_py())
            raise Unreadable(hole, "it must be a list of texts, none of them missing")
        return column
    except Unreadable as error:
        cell = shown(cells[error.row].as_py())
        raise InputError(f"data {data!r}, row {error.row}: {name} is {cell}; {error.reason}") from error


def replaced(dataset: datasets.Dataset, made: datasets.Dataset) -> datasets.Dataset:
    """With the columns of another data set in place of its own."""
    rest = dataset.remove_columns(made.column_names)
    return datasets.concatenate_datasets([rest, made], axis=1) if rest.column_names else made


def alike(dataset: datasets.Dataset, name: str) -> datasets.Dataset:
    """With those of the columns here that joined data sets have, of the types that each of them has.

    Raises:
        InputError: as ``read``, or a column ``image`` of something else.
    """
    dataset = checked(dataset, name)
    if "id" not in dataset.column_names:
        dataset = dataset.add_column("id", [str(row) for row in range(len(dataset))])
    kept = [each for each in dataset.column_names if each in ("id", *COLUMNS, *OPTIONAL)]
    for column, cells, feature in stored(dataset, kept):
        if column in IMAGES and not isinstance(feature, datasets.Image):
            dataset = _with_images(dataset, column, Pictures(cells, feature, name, column))
        elif column not in IMAGES:
            kind: Any = datasets.Value("string")
            kind = datasets.List(kind) if column in LISTS else kind
            if feature != kind:
                schema = datasets.Features({column: kind}).arrow_schema
                told = pa.table({column: read(cells, feature, name, column)}).cast(schema)
                dataset = replaced(dataset, datasets.Dataset(told))
    return dataset.select_columns(kept)


def _with_images(dataset: datasets.Dataset, column: str, pictures: Pictures) -> datasets.Dataset:
    """Arrays as images, and what is stored like one called so."""
    if not pictures.are_arrays:
        return dataset.cast_column(column, datasets.Image())
    shown = [None if (one := pictures[row]) is None else one.decoded(one.called(row)) for row in range(len(dataset))]
    made = datasets.Dataset.from_dict({column: shown}, features=datasets.Features({column: datasets.Image()}))
    return replaced(dataset, made)


def _refuse(missing: pa.ChunkedArray, needed: bool, reason: str) -> None:
    if needed and pc.any(missing).as_py():
        raise Unreadable(pc.index(missing, True).as_py(), reason)
