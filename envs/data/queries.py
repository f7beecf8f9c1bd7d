"""Query sources: data sets with the columns ``image, question, answers`` and optionally ``id``."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Collection, Hashable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import datasets
import numpy as np
from PIL import Image

from maskgym.backbones.encodings.encoding import Query, no_image
from maskgym.common.errors import InputError
from maskgym.common.naming import parse_options
from maskgym.envs.data.accepted import Accepted
from maskgym.envs.data.answer_length import AcceptedLengths
from maskgym.envs.data.benchmarks.metrics import Answered, Metrics
from maskgym.envs.data.benchmarks.rules import RULES
from maskgym.envs.data.benchmarks.source import SOURCES
from maskgym.envs.data.columns import COLUMNS, TEXTS, alike, checked, read, stored
from maskgym.envs.data.local_data import is_hub_id, load_from_hub, load_path, no_rows
from maskgym.envs.data.pictures import IMAGES, Picture, Pictures
from maskgym.envs.data.scenes import scenes
from maskgym.envs.data.scenes_long import scenes_long
from maskgym.envs.data.side_by_side import side_by_side

SPLITS = ("train", "validation", "test")


class DatasetQueries:
    """Queries backed by a ``datasets.Dataset``: texts are read, and images decoded, one by one when asked for, so
    that they take no memory of their own.

    Args:
        dataset: with the columns ``image`` (a ``datasets.Image``, paths, bytes or arrays), ``question``, ``answers``
            (lists of texts, or one text a row, also called ``answer``), and optionally ``id``, ``type`` (kind of
            question), ``beside`` (an image to show to the right of ``image``), ``scoring`` (a rule of
            ``maskgym.envs.data.benchmarks.rules``), ``choices`` (texts of the options) and ``group`` (equal for queries
            that a rule counts together). ``maskgym.envs.data.cells`` says how other types than texts are read.
        name: how the data set is called in records.
        split: the split's name in records.

    Raises:
        InputError: no table, a missing column, a column ``image`` of something else (lists of images, say) or of links,
            a query without question, answer or ``id``, a cell whose text cannot be known, an unknown rule, or no rows.
    """

    def __init__(self, dataset: datasets.Dataset, name: str, split: str):
        dataset = checked(dataset, name)
        missing = [column for column in COLUMNS if column not in dataset.column_names]
        if missing:
            raise InputError(
                f"data {name!r} lacks the column {missing[0]!r}; it has {', '.join(dataset.column_names)}, "
                f"and needs {', '.join(COLUMNS)}"
            )
        if len(dataset) == 0:
            raise no_rows(name, split)
        self.name, self.split = name, split
        there = {each: [column for column in each if column in dataset.column_names] for each in (TEXTS, IMAGES)}
        self._columns = {
            column: read(cells, feature, name, column) for column, cells, feature in stored(dataset, there[TEXTS])
        }
        self._images = {
            column: Pictures(cells, feature, name, column) for column, cells, feature in stored(dataset, there[IMAGES])
        }
        self._rows: Sequence[int] = range(len(dataset))
        self.rules = _rules(self._columns.get("scoring"), name)
        self.accepted_lengths = AcceptedLengths(self._columns["answers"], self._columns.get("scoring"))
        self.patches = list(dataset["patches"]) if "patches" in dataset.column_names else None

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, number: int) -> Query:
        id, question, answers = self.text(number)
        return Query(id, self._image(number), question, answers, self.image_key(number))

    def text(self, number: int) -> tuple[str, str, tuple[str, ...]]:
        """Id, question and answers, without decoding the image."""
        answers = tuple(self._cell("answers", number))
        rule = self._cell("scoring", number)
        if rule is not None:
            answers = Accepted(answers, rule, self._cell("choices", number) or ())
        return self._id(number), self._cell("question", number), answers

    def image_key(self, number: int) -> Hashable:
        """Equal for queries that show the same image: its path, or a digest of its bytes.

        Raises:
            InputError: a query without an image.
        """
        keys = tuple(picture.key for picture in self._pictures(number))
        return keys[0] if len(keys) == 1 else keys

    def by_image(self) -> list[list[int]]:
        """The numbers of the queries that show the same image, image by image in the order of first use; queries
        without an image are left out."""
        groups: dict[Hashable, list[int]] = {}
        for number in range(len(self)):
            if self._images["image"][self._rows[number]] is not None:
                groups.setdefault(self.image_key(number), []).append(number)
        return list(groups.values())

    @cached_property
    def kinds(self) -> list[str] | None:
        """The kind of each question, where the data set names kinds."""
        if "type" not in self._columns:
            return None
        kinds = [sys.intern(self._cell("type", number) or "") for number in range(len(self))]
        return kinds if any(kinds) else None

    @property
    def max_new_tokens(self) -> int:
        """Where the rules have answers cut; one without a rule."""
        return max(1 if rule is None else RULES[rule].max_new_tokens for rule in self.rules)

    def metrics(self, numbers: Sequence[int], texts: Sequence[str], scores: np.ndarray) -> Metrics | None:
        """Scores of the whole data set by part and metric; None if its queries have no one rule.

        Args:
            numbers: (Q,) of the queries that were answered.
            texts: (Q,) the answers.
            scores: (Q,) theirs.
        """
        rule, *others = self.rules
        if rule is None or others:
            return None
        kinds, groups = ([sys.intern(self._cell(name, row) or "") for row in numbers] for name in ("type", "group"))
        counted = self._columns["group"].value_counts().to_pylist() if "group" in self._columns else []
        sizes = {each["values"] or "": each["counts"] for each in counted} or {"": len(texts)}
        return RULES[rule].metrics(Answered(texts, scores, kinds, groups, sizes))

    @property
    def rows(self) -> Sequence[int]:
        """Those of the split that these queries are."""
        return self._rows

    def head(self, limit: int | None) -> DatasetQueries:
        """The first ``limit`` queries, or all.

        Raises:
            InputError: a limit below 1.
        """
        return self if limit is None or self._has_all(limit) else self._only(range(limit))

    def spread(self, limit: int | None) -> DatasetQueries:
        """``limit`` queries, or all where there are fewer: from as many equal stretches one each, always the same.

        The place inside a stretch is drawn: a fixed step would meet the same kind of question again and again where an
        image's questions come in a fixed order.

        Raises:
            InputError: a limit below 1.
        """
        if limit is None or self._has_all(limit):
            return self
        inside = np.random.default_rng(0).random(limit)
        return self._only(((np.arange(limit) + inside) * (len(self) / limit)).astype(int).tolist())

    def without(self, numbers: Collection[int]) -> DatasetQueries:
        """All but some, by number."""
        return self._only([number for number in range(len(self)) if number not in numbers]) if numbers else self

    def _has_all(self, limit: int) -> bool:
        if limit < 1:
            raise InputError(f"limit is {limit}; it must be at least 1")
        return limit >= len(self)

    def _only(self, numbers: Sequence[int]) -> DatasetQueries:
        part = object.__new__(DatasetQueries)
        part.name, part.split, part.rules = self.name, self.split, self.rules
        part.accepted_lengths = self.accepted_lengths
        part._columns, part._images = self._columns, self._images
        part._rows = [self._rows[number] for number in numbers]
        part.patches = None if self.patches is None else [self.patches[number] for number in numbers]
        return part

    def _cell(self, column: str, number: int) -> Any:
        """Its text or texts; None where it is missing, or the data set lacks the column."""
        return self._columns[column][self._rows[number]].as_py() if column in self._columns else None

    def _id(self, number: int) -> str:
        return self._cell("id", number) if "id" in self._columns else str(self._rows[number])

    def _pictures(self, number: int) -> list[Picture]:
        """What a query shows, undecoded, from left to right.

        Raises:
            InputError: a query without an image.
        """
        shown = [self._images[column][self._rows[number]] for column in self._images]
        if shown[0] is None:
            raise no_image(self._id(number))
        return [picture for picture in shown if picture is not None]

    def _image(self, number: int) -> Image.Image:
        of_query = f"of query {self._id(number)!r}"
        decoded = [
            picture.decoded(f"{picture.called(self._rows[number])} {of_query}") for picture in self._pictures(number)
        ]
        return decoded[0] if len(decoded) == 1 else side_by_side(*decoded)


def _rules(scoring: Any | None, name: str) -> tuple[str | None, ...]:
    """The rules that queries of a data set are scored by; None where a query names none."""
    rules = (None,) if scoring is None else tuple(scoring.unique().to_pylist())
    unknown = [rule for rule in rules if rule is not None and rule not in RULES]
    if unknown:
        raise InputError(f"data {name!r}: scoring is {unknown[0]!r}; it must be one of {', '.join(RULES)}, or empty")
    return rules


def easy_vqa(split: str) -> datasets.Dataset:
    """easy-VQA from its PyPI package: one shape an image, 64 x 64 pixels.

    The official test split, and the official training split without the images kept for validation (every tenth).
    """
    import easy_vqa as package

    if split == "test":
        (questions, answers, images), paths = package.get_test_questions(), package.get_test_image_paths()
    else:
        (questions, answers, images), paths = package.get_train_questions(), package.get_train_image_paths()
    rows = [
        {"id": f"{split}-{number}", "image": paths[image], "question": question, "answers": [answer]}
        for number, (question, answer, image) in enumerate(zip(questions, answers, images, strict=True))
        if split == "test" or (image % 10 == 0) == (split == "validation")
    ]
    return datasets.Dataset.from_list(rows).cast_column("image", datasets.Image())


NAMED: dict[str, Callable[..., datasets.Dataset]] = {
    "easy-vqa": easy_vqa,
    "scenes": scenes,
    "scenes-long": scenes_long,
    **SOURCES,
}


def load_queries(data: str = "easy-vqa", split: str = "train", limit: int | None = None) -> DatasetQueries:
    """Queries by name or local path.

    Args:
        data: a name (``easy-vqa``, ``scenes:size=128,seed=3``, ``vqav2:root=/data/vqav2``), a path: of a
            ``save_to_disk`` folder, a table (parquet, Arrow, JSON, CSV, TSV), or a folder of tables by split; a hub id
            (``owner/name``, ``owner/name:config=C,revision=R``); or several joined by ``+``.
        split: ``train``, ``validation`` or ``test``.
        limit: keep this many queries at most.

    Raises:
        InputError: an unknown name, split or format; and what ``DatasetQueries`` refuses.
    """
    if split not in SPLITS:
        raise InputError(f"split is {split!r}; it must be one of {', '.join(SPLITS)}")
    whole = not os.path.exists(data) and "+" in data
    names = data.split("+") if whole else [data]
    parts = [_load(name, split) for name in names]
    if len(parts) > 1:
        parts = [alike(part, name) for part, name in zip(parts, names, strict=True)]
    return DatasetQueries(datasets.concatenate_datasets(parts), data, split).head(limit)


def _load(data: str, split: str) -> datasets.Dataset:
    """One data set by name, perhaps with options as in ``scenes:size=128,seed=3``, by path, or from the hub."""
    name, _, options = data.partition(":")
    if name in NAMED:
        return NAMED[name](split, **parse_options(NAMED[name], f"data {name!r}", options, hidden=("split",)))
    if os.path.exists(data):
        return load_path(Path(data), split)
    if is_hub_id(name):
        hidden = ("split", "repository")
        return load_from_hub(split, name, **parse_options(load_from_hub, f"data {name!r}", options, hidden))
    raise InputError(f"unknown data {data!r}; use one of {', '.join(NAMED)}, a path that exists, or a hub id")
