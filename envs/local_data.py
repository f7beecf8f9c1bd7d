"""Data sets at a local path, in whatever of the usual forms they lie there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import datasets

from backbones.errors import InputError, first_line

FORMATS = {".parquet": "parquet", ".jsonl": "json", ".json": "json"}


def load_path(path: Path, split: str) -> datasets.Dataset:
    """A ``save_to_disk`` folder, a parquet or JSON-lines file, an image folder, or a folder with one file per split.

    Raises:
        InputError: another format, no such split, no rows, or something that cannot be read.
    """
    try:
        if is_saved(path):
            loaded: Any = datasets.load_from_disk(str(path))
            if isinstance(loaded, datasets.DatasetDict):
                loaded = loaded[pick_split(list(loaded), (split,), path)]
        elif path.is_file():
            loaded = datasets.load_dataset(_format(path), data_files=str(path), split="train")
        else:
            files = {file.stem: file for file in sorted(path.iterdir()) if file.suffix in FORMATS}
            files.pop("metadata", None)
            if files:
                file = files[pick_split(list(files), (split,), path)]
                loaded = datasets.load_dataset(_format(file), data_files=str(file), split="train")
            else:
                folders = datasets.load_dataset("imagefolder", data_dir=str(path))
                loaded = folders[pick_split(list(folders), (split,), path)]
    except InputError:
        raise
    except Exception as error:  # datasets raises many kinds; whatever it is, the path could not be read
        if isinstance(error, IndexError | StopIteration) or "corresponds to no data" in str(error):
            raise no_rows(str(path), split) from error
        raise unreadable(path, error) from error
    if getattr(loaded.features.get("image"), "dtype", None) in ("string", "large_string"):
        base = path if path.is_dir() else path.parent
        features = datasets.Features({**loaded.features, "image": datasets.Value("string")})
        loaded = loaded.map(lambda row: {"image": row["image"] and str(base / row["image"])}, features=features)
    return loaded


def is_saved(path: Path) -> bool:
    """Whether ``save_to_disk`` wrote this folder."""
    return (path / "dataset_info.json").exists() or (path / "dataset_dict.json").exists()


def unreadable(path: Path, error: Exception) -> InputError:
    """What to say of a path that ``datasets`` cannot read."""
    return InputError(f"data {str(path)!r} could not be read ({first_line(error)})")


def no_rows(data: str, split: str) -> InputError:
    """What to say of data without a query."""
    return InputError(f"data {data!r}, split {split!r} has no rows; name data that have one or more")


def pick_split(names: list[str], wanted: tuple[str, ...], path: Path) -> str:
    """The first of the wanted splits that there is; a source with a single split serves every request.

    Raises:
        InputError: several splits, and none is wanted.
    """
    for split in wanted:
        if split in names:
            return split
    if len(names) == 1:
        return names[0]
    raise InputError(f"data {str(path)!r} has no split {wanted[0]!r}; it has {', '.join(names)}")


def _format(file: Path) -> str:
    if file.suffix not in FORMATS:
        raise InputError(f"data {str(file)!r} has suffix {file.suffix!r}; supported: {', '.join(FORMATS)}")
    return FORMATS[file.suffix]
