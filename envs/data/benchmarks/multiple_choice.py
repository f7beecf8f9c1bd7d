"""Benchmarks whose answer is the letter of an option: ScienceQA-IMG, MMBench."""

from __future__ import annotations

import base64
import binascii
from collections.abc import Iterator, Sequence
from string import ascii_uppercase

from maskgym.common.plain_files import read_json
from maskgym.envs.data.benchmarks.layout import LETTER, Asked, Benchmark, Entry, Files
from maskgym.envs.data.benchmarks.reading import json_entries, tab_separated


def _with_options(context: str, question: str, choices: Sequence[str]) -> str:
    options = [f"{letter}. {choice}" for letter, choice in zip(ascii_uppercase, choices, strict=False)]
    return "\n".join([*filter(None, [context]), question, *options])


def _scienceqa(files: Files, part: str) -> Iterator[Entry]:
    """The problems of a split that have an image."""
    of_split = set(read_json(files["splits"])[part])
    for id, entry in json_entries(files["problems"]):
        if id in of_split and entry["image"]:
            yield {**entry, "id": id, "image": str(files["images"] / id / entry["image"])}


def _ask_scienceqa(entry: Entry) -> Asked:
    choices = list(entry["choices"])
    context = f"Context: {entry['hint']}" if entry["hint"] else ""
    question = _with_options(context, entry["question"], choices)
    letter = ascii_uppercase[entry["answer"]]
    return Asked(str(entry.get("id", "")), question, [letter], entry.get("subject", ""), choices=choices)


SCIENCEQA = Benchmark(
    files={"problems": ("problems.json",), "splits": ("pid_splits.json",), "images": ("images/{part}", "{part}")},
    folders=("data/scienceqa", "data"),
    splits={"train": ("train",), "validation": ("val",), "test": ("test",)},
    parts=("train", "val", "test", "minival", "minitest"),
    entries=_scienceqa,
    ask=_ask_scienceqa,
    prompt=LETTER,
)
"""ScienceQA (Lu et al. 2022, arXiv 2209.09513), the problems with an image, ``data/scienceqa`` of
github.com/lupantech/ScienceQA; the prompt as in LLaVA and lmms-eval."""


CIRCULAR = 1_000_000
"""A question's other orders of options have its number plus multiples of this."""

_LONGEST_NUMBER = 64


def _mmbench(files: Files, part: str) -> Iterator[Entry]:
    """Rows of the table; where the image is a number, it is that of the row with the same image."""

    def rows() -> Iterator[Entry]:
        return tab_separated(files["table"])

    shared = {int(entry["image"]) for entry in rows() if len(entry["image"]) <= _LONGEST_NUMBER}
    images: dict[str, str] = {}
    if shared:
        images = {entry["index"]: entry["image"] for entry in rows() if int(entry["index"]) in shared}
    for entry in rows():
        yield {**entry, "image": _decoded(images.get(entry["image"]) or entry["image"])}


def _decoded(text: str) -> bytes:
    """The bytes behind base64; of something else none, which then fails as the image of its query."""
    try:
        return base64.b64decode(text)
    except binascii.Error:
        return b""


def _given(cell: object) -> bool:
    """Whether a cell holds something; tables spell its absence in several ways."""
    return cell is not None and str(cell).lower() not in ("", "nan", "none")


def _ask_mmbench(entry: Entry) -> Asked:
    choices = [str(entry[letter]) for letter in "ABCD" if _given(entry.get(letter))]
    hint = str(entry["hint"]) if _given(entry.get("hint")) else ""
    number = int(entry["index"])
    kind = entry.get("l2-category") or entry.get("category") or ""
    question = _with_options(hint, entry["question"], choices)
    return Asked(str(number), question, [entry["answer"]], kind, str(number % CIRCULAR), choices)


MMBENCH = Benchmark(
    files={"table": ("mmbench_{part}.tsv", "MMBench_{part}.tsv")},
    splits={"test": ("dev_20230712",)},
    parts=("dev_20230712", "dev_en_20231003", "dev_cn_20231003", "DEV_EN", "DEV_CN", "DEV_EN_V11", "DEV_CN_V11"),
    entries=_mmbench,
    ask=_ask_mmbench,
    prompt=LETTER,
)
"""MMBench (Liu et al. 2023, arXiv 2307.06281), a dev table of github.com/open-compass/MMBench or VLMEvalKit, which
holds every question in as many orders of its options as there are; LLaVA reports ``mmbench_dev_20230712.tsv``."""
