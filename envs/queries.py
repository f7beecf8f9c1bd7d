"""Query sources: data sets with the columns ``image, question, answers`` and optionally ``id``."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Callable, Hashable, Sequence
from pathlib import Path
from typing import Any

import datasets
import numpy as np
from PIL import Image

from backbones.encoding import Query, no_image
from backbones.errors import InputError
from backbones.images import read_image
from backbones.naming import parse_options
from envs.scenes import scenes

COLUMNS = ("image", "question", "answers")
SPLITS = ("train", "validation", "test")


class DatasetQueries:
    """Queries backed by a ``datasets.Dataset``; images are decoded one by one, when asked for.

    Args:
        dataset: with the columns ``image`` (a ``datasets.Image``), ``question``, ``answers`` (list of strings),
            and optionally ``id``.
        name: how the data set is called in records.
        split: the split's name in records.

    Raises:
        InputError: a missing column, a column ``image`` of something else (lists of images, say), or no rows.
    """

    def __init__(self, dataset: datasets.Dataset, name: str, split: str):
        missing = [column for column in COLUMNS if column not in dataset.column_names]
        if missing:
            raise InputError(
                f"data {name!r} lacks the column {missing[0]!r}; it has {', '.join(dataset.column_names)}, "
                f"and needs {', '.join(COLUMNS)}"
            )
        if len(dataset) == 0:
            raise InputError(f"data {name!r}, split {split!r} has no rows")
        self.name, self.split = name, split
        self._images = _undecoded_images(dataset, name)
        self._questions = [str(question) for question in dataset["question"]]
        self._answers = [_answer_tuple(answers, name, row) for row, answers in enumerate(dataset["answers"])]
        has_ids = "id" in dataset.column_names
        self._ids = [str(id) for id in dataset["id"]] if has_ids else [str(row) for row in range(len(dataset))]
        self.kinds = [str(kind) for kind in dataset["type"]] if "type" in dataset.column_names else None
        self.patches = list(dataset["patches"]) if "patches" in dataset.column_names else None

    def __len__(self) -> int:
        return len(self._questions)

    def __getitem__(self, number: int) -> Query:
        id, question, answers = self.text(number)
        return Query(id, self._decode(number), question, answers, self.image_key(number))

    def text(self, number: int) -> tuple[str, str, tuple[str, ...]]:
        """Id, question and answers, without decoding the image."""
        return self._ids[number], self._questions[number], self._answers[number]

    def image_key(self, number: int) -> Hashable:
        """Equal for queries that show the same image: its path, or a digest of its bytes.

        Raises:
            InputError: a query without an image.
        """
        return _key(self._stored_image(number))

    def by_image(self) -> list[list[int]]:
        """The numbers of the queries that show the same image, image by image in the order of first use; queries
        without an image are left out."""
        groups: dict[Hashable, list[int]] = {}
        for start in range(0, len(self), 4096):
            for number, image in enumerate(self._images[start : start + 4096]["image"], start):
                if image is not None:
                    groups.setdefault(_key(image), []).append(number)
        return list(groups.values())

    def head(self, limit: int | None) -> DatasetQueries:
        """The first ``limit`` queries, or all."""
        return self if limit is None or limit >= len(self) else self._only(range(limit))

    def spread(self, limit: int) -> DatasetQueries:
        """``limit`` queries, or all where there are fewer: from as many equal stretches one each, always the same.

        The place inside a stretch is drawn: a fixed step would meet the same kind of question again and again where an
        image's questions come in a fixed order.
        """
        if limit >= len(self):
            return self
        inside = np.random.default_rng(0).random(limit)
        return self._only(((np.arange(limit) + inside) * (len(self) / limit)).astype(int).tolist())

    def _only(self, rows: Sequence[int]) -> DatasetQueries:
        part = object.__new__(DatasetQueries)
        part.name, part.split = self.name, self.split
        part._images = self._images.select(rows)
        part._questions = [self._questions[row] for row in rows]
        part._answers = [self._answers[row] for row in rows]
        part._ids = [self._ids[row] for row in rows]
        part.kinds = None if self.kinds is None else [self.kinds[row] for row in rows]
        part.patches = None if self.patches is None else [self.patches[row] for row in rows]
        return part

    def _stored_image(self, number: int) -> dict[str, Any]:
        image = self._images[number]["image"]
        if image is None or (image["path"] is None and image["bytes"] is None):
            raise no_image(self._ids[number])
        return image

    def _decode(self, number: int) -> Image.Image:
        image = self._stored_image(number)
        called = f"image {image['path'] or f'row {number}'} of query {self._ids[number]!r}"
        return read_image(image["path"] if image["bytes"] is None else io.BytesIO(image["bytes"]), called)


def _undecoded_images(dataset: datasets.Dataset, name: str) -> datasets.Dataset:
    """The column ``image`` as stored: an unreadable image is met, and named, only when its own query is asked for.

    A data set of its own: a ``datasets.Column`` reads whole rows, a hundred times as slowly.
    """
    try:
        return dataset.select_columns(["image"]).cast_column("image", datasets.Image(decode=False)).with_format(None)
    except (TypeError, ValueError, NotImplementedError) as error:  # what datasets and Arrow raise
        raise InputError(
            f"data {name!r}: the column 'image' is {dataset.features['image']}; it must hold one image a row, several "
            "images a query are not supported"
        ) from error


def _key(image: dict[str, Any]) -> Hashable:
    if image["path"] is not None and image["bytes"] is None:
        return image["path"]
    return hashlib.blake2b(image["bytes"], digest_size=16).digest()


def _answer_tuple(answers: Any, name: str, row: int) -> tuple[str, ...]:
    if isinstance(answers, str) or not hasattr(answers, "__iter__"):
        raise InputError(f"data {name!r}, row {row}: answers is {answers!r}; it must be a list of strings")
    return tuple(str(answer) for answer in answers)


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


NAMED: dict[str, Callable[..., datasets.Dataset]] = {"easy-vqa": easy_vqa, "scenes": scenes}


def load_queries(data: str = "easy-vqa", split: str = "train", limit: int | None = None) -> DatasetQueries:
    """Queries by name or local path.

    Args:
        data: a name (``easy-vqa``, ``scenes``, ``scenes:size=128,seed=3``) or a path: a ``save_to_disk`` folder, a
            parquet or JSON-lines file, an image folder with ``metadata.jsonl``, or a folder with one such file per
            split; or several joined by ``+``.
        split: ``train``, ``validation`` or ``test``.
        limit: keep this many queries at most.

    Raises:
        InputError: an unknown name, split or format; a missing column.
    """
    if split not in SPLITS:
        raise InputError(f"split is {split!r}; it must be one of {', '.join(SPLITS)}")
    if limit is not None and limit < 1:
        raise InputError(f"limit is {limit}; it must be at least 1")
    whole = not Path(data).exists() and "+" in data
    parts = [_load(part, split) for part in (data.split("+") if whole else [data])]
    if len(parts) > 1:
        parts = [_with_ids(part).select_columns(["id", *COLUMNS]) for part in parts]
    return DatasetQueries(datasets.concatenate_datasets(parts), data, split).head(limit)


def _load(data: str, split: str) -> datasets.Dataset:
    """One data set by name, perhaps with options as in ``scenes:size=128,seed=3``, or by path."""
    name, _, options = data.partition(":")
    if name in NAMED:
        return NAMED[name](split, **parse_options(NAMED[name], f"data {name!r}", options, hidden=("split",)))
    if Path(data).exists():
        return _load_path(Path(data), split)
    raise InputError(f"unknown data {data!r}; use one of {', '.join(NAMED)}, or a path that exists")


def _with_ids(dataset: datasets.Dataset) -> datasets.Dataset:
    if "id" in dataset.column_names:
        return dataset
    return dataset.add_column("id", [str(row) for row in range(len(dataset))])


def _load_path(path: Path, split: str) -> datasets.Dataset:
    try:
        if (path / "dataset_info.json").exists() or (path / "dataset_dict.json").exists():
            loaded: Any = datasets.load_from_disk(str(path))
            if isinstance(loaded, datasets.DatasetDict):
                loaded = loaded[_pick_split(list(loaded), split, path)]
        elif path.is_file():
            loaded = datasets.load_dataset(_format(path), data_files=str(path), split="train")
        else:
            files = {file.stem: file for file in sorted(path.iterdir()) if file.suffix in _FORMATS}
            files.pop("metadata", None)
            if files:
                file = files[_pick_split(list(files), split, path)]
                loaded = datasets.load_dataset(_format(file), data_files=str(file), split="train")
            else:
                folders = datasets.load_dataset("imagefolder", data_dir=str(path))
                loaded = folders[_pick_split(list(folders), split, path)]
    except InputError:
        raise
    except Exception as error:  # datasets raises many kinds; whatever it is, the path could not be read
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise InputError(f"data {str(path)!r} could not be read ({reason})") from error
    if getattr(loaded.features.get("image"), "dtype", None) in ("string", "large_string"):
        base = path if path.is_dir() else path.parent
        features = datasets.Features({**loaded.features, "image": datasets.Value("string")})
        loaded = loaded.map(lambda row: {"image": row["image"] and str(base / row["image"])}, features=features)
    return loaded


_FORMATS = {".parquet": "parquet", ".jsonl": "json", ".json": "json"}


def _format(file: Path) -> str:
    if file.suffix not in _FORMATS:
        raise InputError(f"data {str(file)!r} has suffix {file.suffix!r}; supported: {', '.join(_FORMATS)}")
    return _FORMATS[file.suffix]


def _pick_split(names: list[str], split: str, path: Path) -> str:
    """The split asked for; a source with a single split serves every request."""
    if split in names:
        return split
    if len(names) == 1:
        return names[0]
    raise InputError(f"data {str(path)!r} has no split {split!r}; it has {', '.join(names)}")
