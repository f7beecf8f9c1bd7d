"""Data sets at a local path or on the hub, in whatever of the usual forms they lie there."""

from __future__ import annotations

import os
import re
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from glob import escape
from pathlib import Path
from typing import Any

import datasets
import pandas as pd
from datasets.data_files import DEFAULT_PATTERNS_ALL, SPLIT_KEYWORDS, _get_data_files_patterns, resolve_pattern
from huggingface_hub import HfApi

from maskgym.backbones.encodings.images import is_no_path
from maskgym.common.errors import InputError, printable
from maskgym.envs.data.columns import replaced
from maskgym.envs.data.pictures import IMAGES

FORMATS = {".parquet": "parquet", ".arrow": "arrow", ".csv": "csv", ".tsv": "csv"}
FORMATS |= dict.fromkeys((".jsonl", ".ndjson", ".json"), "json")
PACKED = (".gz", ".bz2", ".xz", ".zst")
"""What a table may be packed in, as in ``train.jsonl.gz``."""

METADATA = "metadata"
"""Name of the tables of an image folder, whose column ``file_name`` names the images."""

SHARD = re.compile(r"[-_ ]*\d*(-of-\d+)?$")
"""What tells the shards of one table apart, at the end of their names."""

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
LONGEST_REASON = 240
PATIENCE = 10
"""Seconds that the hub has for saying whether a data set is there."""


def load_path(path: Path, split: str) -> datasets.Dataset:
    """A ``save_to_disk`` folder, a table in parquet, Arrow, JSON, CSV or TSV, or a folder of such tables: of image
    folders with metadata, by split, in shards, or as its README says.

    Raises:
        InputError: another format, no such split, no rows, or something that cannot be read.
    """
    try:
        with _quiet():
            return _open(path, split)
    except InputError:
        raise
    except Exception as error:  # datasets raises many kinds; whatever it is, the path could not be read
        if isinstance(error, IndexError | StopIteration) or "corresponds to no data" in str(error):
            raise no_rows(str(path), split) from error
        raise unreadable(path, error) from error


def load_from_hub(split: str, repository: str, config: str = "", revision: str = "") -> datasets.Dataset:
    """A split of a data set on the hub; the others are not fetched.

    Args:
        split: ``train``, ``validation`` or ``test``.
        repository: ``owner/name``.
        config: of a repository that has several.
        revision: branch, tag or commit.

    Raises:
        InputError: nothing of that name that can be fetched, or no such split.
    """
    load = {"path": repository, "name": config or None, "revision": revision or None}
    try:
        HfApi().dataset_info(repository, revision=revision or None, timeout=PATIENCE)  # datasets would try for a minute
        files = datasets.load_dataset_builder(**load).config.data_files or {}
        picked = pick_split(list(files), names_of(split), repository)
        if not all(str(file).startswith(f"hf://datasets/{repository}@") for file in files[picked]):
            raise ValueError("its README has data outside of it")
        return datasets.load_dataset(
            **load, data_files={picked: files[picked]}, split=picked, verification_mode="no_checks"
        )
    except InputError:
        raise
    except Exception as error:  # no network, no such repository, no right to it, no data in it: a kind each
        raise InputError(
            f"data {repository!r} is no path here, and could not be fetched from the hub ({_reason(error)}); where "
            f"there is network, run `hf download {repository} --repo-type dataset --local-dir FOLDER`, and give that"
        ) from error


def is_hub_id(name: str) -> bool:
    """Whether a name can be one on the hub, and is not the path of a table that is missing."""
    return HUB_ID.fullmatch(name) is not None and not _format(Path(name))


def is_saved(path: Path) -> bool:
    """Whether ``save_to_disk`` wrote this folder."""
    return (path / "dataset_info.json").exists() or (path / "dataset_dict.json").exists()


def unreadable(path: Path, error: Exception) -> InputError:
    """What to say of a path that ``datasets`` cannot read."""
    return InputError(f"data {str(path)!r} could not be read ({_reason(error)})")


def no_rows(data: str, split: str) -> InputError:
    """What to say of data without a query."""
    return InputError(f"data {data!r}, split {split!r} has no rows; name data that have one or more")


def names_of(split: str) -> tuple[str, ...]:
    """What a split may be called, its own name first: ``val`` or ``dev``, say, for ``validation``."""
    return tuple(SPLIT_KEYWORDS[datasets.Split(split)])


def pick_split(names: Sequence[str], wanted: Sequence[str], place: Path | str) -> str:
    """The first of the wanted splits that there is; a source with a single split serves every request.

    Raises:
        InputError: several splits, and none is wanted.
    """
    for split in wanted:
        if split in names:
            return split
    if len(names) == 1:
        return names[0]
    raise InputError(f"data {str(place)!r} has no split {wanted[0]!r}; it has {', '.join(names)}")


def named_files(path: Path) -> dict[str, list[Path]]:
    """Files by split, of a folder as on the hub, whose README may say which of them are data.

    Raises:
        ValueError: data outside of the folder.
    """
    named = datasets.load_dataset_builder(str(path)).config.data_files or {}
    for file in (file for files in named.values() for file in files):
        if not Path(os.path.abspath(file)).is_relative_to(path.absolute()):
            raise ValueError(f"its README has data in {file!r}, outside of it")
    return {split: [Path(file) for file in files] for split, files in named.items()}


def _open(path: Path, split: str) -> datasets.Dataset:
    if path.is_file():
        return _tables([path])
    if is_saved(path):
        saved: Any = datasets.load_from_disk(str(path))
        return saved[pick_split(list(saved), names_of(split), path)] if isinstance(saved, dict) else saved
    splits = _splits(path)
    if splits:
        return _tables(splits[pick_split(list(splits), names_of(split), path)])
    folders: Any = datasets.load_dataset("imagefolder", data_dir=str(path))  # in an archive, say
    return folders[pick_split(list(folders), names_of(split), path)]


def _splits(path: Path) -> dict[str, list[Path]]:
    """The tables in a folder by split: as its README says, else by the names that ``datasets`` knows, else by their
    own; those of an image folder where there are no others."""
    if any((path / name).is_file() for name in (datasets.config.REPOCARD_FILENAME, datasets.config.REPOYAML_FILENAME)):
        named = named_files(path)
        if all(_format(file) for files in named.values() for file in files):
            return named
    return _found(path, lambda file: file.stem != METADATA) or _found(path, lambda file: file.stem == METADATA)


def _found(path: Path, is_meant: Callable[[Path], bool]) -> dict[str, list[Path]]:
    def find(pattern: str) -> list[Path]:
        extensions = [*FORMATS, *PACKED]
        found = map(Path, resolve_pattern(pattern, escape(str(path.absolute())), allowed_extensions=extensions))
        return sorted(file for file in found if _format(file) and is_meant(file))

    splits: dict[str, list[Path]] = defaultdict(list)
    try:
        patterns = _get_data_files_patterns(lambda pattern: [str(file) for file in find(pattern)])
        left = set(find("**"))
    except FileNotFoundError:
        return {}
    for split, own in (patterns if patterns != DEFAULT_PATTERNS_ALL else {}).items():
        for pattern in own:
            try:
                splits[str(split)] += [file for file in find(pattern) if file in left]
            except FileNotFoundError:
                continue
            left -= set(splits[str(split)])
    for file in sorted(left):
        splits[SHARD.sub("", file.name.split(".")[0]) or "train"].append(file)
    return dict(splits)


def _tables(files: Sequence[Path]) -> datasets.Dataset:
    """The rows of files of one format; paths of images are relative to their own file."""
    formats = {_format(file) for file in files}
    if formats == {""}:
        raise InputError(
            f"data {str(files[0])!r} has suffix {files[0].suffix!r}; supported: {', '.join(FORMATS)}, and these packed "
            f"({', '.join(PACKED)})"
        )
    if len(formats) > 1:
        listed = ", ".join(file.name for file in files[:3])
        raise InputError(f"data in {str(files[0].parent)!r} come in several formats ({listed}); give one file's path")
    folders: dict[Path, list[Path]] = defaultdict(list)
    for file in files:
        folders[file.absolute().parent].append(file)
    loaded = [_with_paths(_table(own, *formats), folder) for folder, own in folders.items()]
    return datasets.concatenate_datasets(loaded) if len(loaded) > 1 else loaded[0]


def _table(files: Sequence[Path], format: str) -> datasets.Dataset:
    """The rows of files in one folder, with texts as they stand there: CSV has no types, and JSON no dates."""
    load = partial(datasets.load_dataset, format, data_files=[escape(str(file)) for file in files], split="train")
    if format == "csv":
        separator = "\t" if _suffix(files[0]) == ".tsv" else ","
        names = pd.read_csv(files[0], sep=separator, nrows=0).columns
        features = datasets.Features(dict.fromkeys(map(str, names), datasets.Value("string")))
        return load(sep=separator, features=features, keep_default_na=False, na_values=[""])
    loaded = load()
    dated = [name for name, feature in loaded.features.items() if format == "json" and "timestamp" in repr(feature)]
    if dated:
        return load(features=datasets.Features({**loaded.features, **dict.fromkeys(dated, datasets.Json())}))
    return loaded


def _with_paths(dataset: datasets.Dataset, folder: Path) -> datasets.Dataset:
    """With the images' columns by their names here, and absolute paths in them."""
    for column in IMAGES:
        names = [f"{column}_file_name", "file_name"][: 1 + (column == "image")]
        named = next((name for name in names if name in dataset.column_names), None)
        if named and column not in dataset.column_names:
            dataset = dataset.rename_column(named, column)
        if getattr(dataset.features.get(column), "dtype", None) in ("string", "large_string", "string_view"):
            absolute = dataset.select_columns([column]).map(
                lambda cells: {name: [_absolute(folder, cell) for cell in cells[name]] for name in cells},
                batched=True,
                features=datasets.Features({column: datasets.Value("string")}),
            )
            dataset = replaced(dataset, absolute)
    return dataset


def _absolute(folder: Path, path: str | None) -> str | None:
    return path if not path or is_no_path(path) else str(folder / path)


def _suffix(file: Path) -> str:
    return (file.with_suffix("") if file.suffix in PACKED else file).suffix.lower()


def _format(file: Path) -> str:
    """Empty where it is none that is known."""
    return FORMATS.get(_suffix(file), "")


@contextmanager
def _quiet() -> Iterator[None]:
    """Without what ``datasets`` itself says of an error that it raises."""
    before = datasets.logging.get_verbosity()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)
    try:
        yield
    finally:
        datasets.logging.set_verbosity(before)


def _reason(error: Exception) -> str:
    """What an error of ``datasets`` says, in one line, as far as it is no heading."""
    told = (
        error.__cause__ if isinstance(error, datasets.exceptions.DatasetGenerationError) and error.__cause__ else error
    )
    line = printable(str(told)) or type(told).__name__
    return line if len(line) <= LONGEST_REASON else f"{line[:LONGEST_REASON]}…"
