"""Benchmarks by name, as data sets with the columns of every other: from official files, or copies of them that
``datasets`` reads."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa

from maskgym.common.errors import InputError
from maskgym.common.plain_files import MALFORMED
from maskgym.envs.data.benchmarks.layout import Benchmark
from maskgym.envs.data.benchmarks.multiple_choice import MMBENCH, SCIENCEQA
from maskgym.envs.data.benchmarks.short_answers import CLEVR, GQA, TEXTVQA, TEXTVQA_OCR, VIZWIZ, VQAV2
from maskgym.envs.data.benchmarks.true_or_false import MME, NLVR2, POPE
from maskgym.envs.data.cached import cached
from maskgym.envs.data.cells import said, texts
from maskgym.envs.data.columns import replaced, stored
from maskgym.envs.data.local_data import is_saved, named_files, pick_split, unreadable

VERSION = 2
"""Raised when the same files give other rows than before, so that no cache mixes the two."""

BENCHMARKS = {
    "vqav2": VQAV2,
    "gqa": GQA,
    "textvqa": TEXTVQA,
    "textvqa with ocr": TEXTVQA_OCR,
    "vizwiz": VIZWIZ,
    "clevr": CLEVR,
    "pope": POPE,
    "mme": MME,
    "nlvr2": NLVR2,
    "scienceqa": SCIENCEQA,
    "mmbench": MMBENCH,
}

TEXTS = datasets.List(datasets.Value("string"))
FEATURES = datasets.Features(
    {
        "id": datasets.Value("string"),
        "question": datasets.Value("string"),
        "answers": TEXTS,
        "type": datasets.Value("string"),
        "group": datasets.Value("string"),
        "choices": TEXTS,
        "scoring": datasets.Value("string"),
    }
)
ON_THE_HUB = {
    "train2014": "train",
    "val2014": "validation",
    "train_balanced": "train",
    "val_balanced": "validation",
    "testdev_balanced": "testdev",
    "val": "validation",
    "dev": "validation",
    "dev_20230712": "dev",
}
"""Splits of copies that are not called as the official part."""


def load(
    split: str, benchmark: str, root: str = "", part: tuple[str, ...] = (), prompt: str = "llava"
) -> datasets.Dataset:
    """A split of a benchmark; annotations are read once, into the cache of ``datasets``.

    Args:
        split: ``train``, ``validation`` or ``test``.
        benchmark: its name.
        root: folder with the official files, or with a copy that ``datasets`` reads: ``save_to_disk``, or parquet as on
            the hub.
        part: official parts to read, whatever the split.
        prompt: ``llava``, the template of LLaVA's protocol; ``none``; or a text file with one that holds
        ``{question}``.

    Raises:
        InputError: missing files, each named; no such split or part; files that are not as published.
    """
    name, made = benchmark.split()[0], BENCHMARKS[benchmark]
    folder = Path(root)
    if not root or not folder.exists():
        raise InputError(
            f"data {name!r} needs root=FOLDER, with its official files, as in {name}:root=/data/{name}"
            + (f"; {root!r} does not exist" if root else "")
        )
    parts = _parts(name, made, split, part)
    template = _template(made, prompt)
    if is_saved(folder) or folder.suffix == ".parquet" or any(map(_has_parquet, (folder, folder / "data"))):
        return _from_copy(name, benchmark, folder, split, parts, template)
    files = made.locate(name, folder, parts)
    stamps = repr([_stamp(place) for found in files for role, place in found.items() if role != "images"])
    options = {"benchmark": benchmark, "root": root, "parts": "-".join(parts), "template": template}
    columns = {column: datasets.Image() for column in made.images.values()}
    made_once = {**options, "stamps": stamps, "version": VERSION}
    return cached(rows, made_once, datasets.Features({**FEATURES, **columns}), split, f"data {name!r}")


def textvqa(
    split: str, root: str = "", part: tuple[str, ...] = (), prompt: str = "llava", ocr: bool = False
) -> datasets.Dataset:
    """As ``load``; with ``ocr`` the prompt holds the words that were read in the image."""
    return load(split, "textvqa with ocr" if ocr else "textvqa", root, part, prompt)


SOURCES: dict[str, Callable[..., datasets.Dataset]] = {
    name: textvqa if name == "textvqa" else partial(load, benchmark=name) for name in BENCHMARKS if " " not in name
}
"""By name; called with a split and options."""


def rows(
    benchmark: str, root: str, parts: str, template: str, stamps: str = "", version: int = VERSION
) -> Iterator[dict[str, Any]]:
    """Rows of a benchmark's official files.

    Args:
        benchmark: name in ``BENCHMARKS``.
        root: folder.
        parts: joined by ``-``.
        template: of the prompt.
        stamps: sizes and times of the files, and
        version: of this code: parts of the cache's key, nothing else.

    Raises:
        InputError: an entry that is not as published.
    """
    made = BENCHMARKS[benchmark]
    of_part = parts.split("-")
    for part, files in zip(of_part, made.locate(benchmark, Path(root), of_part), strict=True):
        try:
            for number, entry in enumerate(made.entries(files, part)):
                images = {column: _image(entry[column]) for column in made.images.values()}
                yield {**_row(benchmark, template, number, entry), **images}
        except InputError:
            raise
        except MALFORMED as error:
            raise InputError(
                f"data {benchmark!r}: the files of {part!r} are not as published ({error!r:.100})"
            ) from error


def _from_copy(
    name: str, benchmark: str, folder: Path, split: str, parts: Sequence[str], template: str
) -> datasets.Dataset:
    """From a copy that has the official fields as columns; its images stay where they are."""
    made = BENCHMARKS[benchmark]
    loaded = _with_label_names(_open_copy(folder, split, parts))
    images = made.images if set(made.images) <= set(loaded.column_names) else {v: v for v in made.images.values()}
    if not set(images) <= set(loaded.column_names):
        raise InputError(
            f"data {name!r}: the copy in {str(folder)!r} lacks the columns {', '.join(images)}; it has "
            f"{', '.join(loaded.column_names)}"
        )
    shown = loaded.select_columns(list(images)).rename_columns(dict(images))
    told = loaded.remove_columns(list(images))
    stored = shown.cast(datasets.Features(dict.fromkeys(shown.features, datasets.Image(decode=False))))
    there = stored.with_format("arrow")[:]
    kept = np.flatnonzero(np.all([column.is_valid().to_numpy() for column in there.columns], axis=0))
    if "category" in told.column_names and set(parts) < set(made.parts):
        kept = kept[np.isin(np.array(told["category"])[kept], parts)]
    if len(kept) < len(told):
        shown, told = shown.select(kept), told.select(kept)
    asked = told.map(
        partial(_row_of_copy, benchmark, template),
        with_indices=True,
        remove_columns=told.column_names,
        features=FEATURES,
        fn_kwargs={"version": VERSION},
        desc=name,
    )
    return datasets.concatenate_datasets([asked, shown], axis=1)


def _with_label_names(dataset: datasets.Dataset) -> datasets.Dataset:
    """With the names of labels, which are stored as numbers."""
    labels = [name for name, feature in dataset.features.items() if isinstance(feature, datasets.ClassLabel)]
    named = {name: texts(cells, feature) for name, cells, feature in stored(dataset, labels)}
    return replaced(dataset, datasets.Dataset(pa.table(named))) if named else dataset


def _open_copy(folder: Path, split: str, parts: Sequence[str]) -> datasets.Dataset:
    try:
        opened: Any = datasets.load_from_disk(str(folder)) if is_saved(folder) else _load_parquet(folder)
    except Exception as error:  # datasets raises many kinds; whatever it is, the copy could not be read
        raise unreadable(folder, error) from error
    if isinstance(opened, datasets.DatasetDict):
        own = [opened[part] for part in parts if part in opened]
        wanted = (*(ON_THE_HUB[part] for part in parts if part in ON_THE_HUB), split)
        opened = datasets.concatenate_datasets(own) if own else opened[pick_split(list(opened), wanted, folder)]
    assert isinstance(opened, datasets.Dataset)
    return opened


def _load_parquet(path: Path) -> Any:
    """A file, or a folder as on the hub.

    Raises:
        ValueError: data outside of the folder.
    """
    if path.is_file():
        return datasets.load_dataset("parquet", data_files=str(path))
    named_files(path)
    return datasets.load_dataset(str(path))


def _row_of_copy(
    benchmark: str, template: str, entry: dict[str, Any], number: int, version: int = VERSION
) -> dict[str, Any]:
    return _row(benchmark, template, number, entry)


def _row(benchmark: str, template: str, number: int, entry: dict[str, Any]) -> dict[str, Any]:
    """What an entry asks, in our columns."""
    name, made = benchmark.split()[0], BENCHMARKS[benchmark]
    try:
        asked = made.ask(entry)
        question, answers = said(asked.question), [said(each) for each in asked.answers]
        if question is None or None in answers:
            raise ValueError("its question is missing" if question is None else "an answer is missing")
        if made.replaced and template != "{question}":
            question = question.removesuffix(made.replaced).rstrip()
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        reason = f"no {error}" if isinstance(error, KeyError) else str(error)
        raise InputError(
            f"data {name!r}: entry {number} is not as published ({reason:.100}); it has {', '.join(map(str, entry))}"
        ) from error
    if not answers:
        raise InputError(f"data {name!r}: entry {number} has no answers; scoring needs a part with public ones")
    return {
        "id": asked.id or str(number),
        "question": template.replace("{question}", question),
        "answers": answers,
        "type": asked.kind,
        "group": asked.group,
        "choices": list(asked.choices),
        "scoring": name,
    }


def _parts(name: str, made: Benchmark, split: str, asked: Sequence[str]) -> tuple[str, ...]:
    unknown = [part for part in asked if part not in made.parts]
    if unknown:
        raise InputError(f"data {name!r} has no part {unknown[0]!r} with public answers; use {', '.join(made.parts)}")
    if not asked and split not in made.splits:
        raise InputError(
            f"data {name!r} is there to test on and has no split {split!r}; take other data for that, or name a part, "
            f"as in {name}:root=...,part={made.parts[0]}"
        )
    return tuple(asked) or made.splits[split]


def _template(made: Benchmark, prompt: str) -> str:
    if prompt in ("llava", "none"):
        return made.prompt if prompt == "llava" else "{question}"
    try:
        template = Path(prompt).read_text(encoding="utf-8").removesuffix("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"prompt is {prompt!r}; it must be llava, none, or a readable text file ({error})") from error
    if "{question}" not in template:
        raise InputError(f"the prompt in {prompt!r} has no {{question}}; write it where the question stands")
    return template


def _has_parquet(folder: Path) -> bool:
    return next(folder.glob("*.parquet"), None) is not None


def _image(image: str | bytes) -> dict[str, Any]:
    return {"path": image, "bytes": None} if isinstance(image, str) else {"path": None, "bytes": image}


def _stamp(place: Path) -> list[tuple[str, int, int]]:
    """Of a file, or of the texts in a folder: names, sizes and times of change."""
    files = sorted(place.rglob("*.txt")) if place.is_dir() else [place]
    return [(str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in files]
