"""Benchmarks whose answers are a word or a phrase: VQAv2, GQA, TextVQA, VizWiz, CLEVR."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Any

from maskgym.common.errors import InputError
from maskgym.envs.data.benchmarks.layout import SHORT, Asked, Benchmark, Entry, Files
from maskgym.envs.data.benchmarks.reading import json_entries


def _said(answers: Iterable[object] | dict[str, Iterable[object]]) -> list[Any]:
    """Annotators' answers, official (``{"answer": ...}``), as plain texts, or as ``datasets`` turns a sequence of
    mappings, into a mapping of sequences."""
    listed = answers["answer"] if isinstance(answers, dict) else answers
    return [each["answer"] if isinstance(each, dict) else each for each in listed]


def _vqav2(files: Files, part: str) -> Iterator[Entry]:
    """Questions with their annotations, by question id; both files are read along, for their order is the same."""
    waiting: dict[int, Entry] = {}
    questions = (entry for _, entry in json_entries(files["questions"], "questions"))
    annotations = (entry for _, entry in json_entries(files["annotations"], "annotations"))
    exhausted = object()
    while True:
        pair = (next(questions, exhausted), next(annotations, exhausted))
        if pair == (exhausted, exhausted):
            break
        for entry in pair:
            if isinstance(entry, dict):
                other = waiting.pop(entry["question_id"], None)
                if other is None:
                    waiting[entry["question_id"]] = entry
                else:
                    both = {**other, **entry}
                    yield {**both, "image": str(files["images"] / f"COCO_{part}_{both['image_id']:012d}.jpg")}
    if waiting:
        raise InputError(
            f"question {next(iter(waiting))} and {len(waiting) - 1} more are in one of {files['questions'].name}, "
            f"{files['annotations'].name} only; take both of one split and version"
        )


VQAV2 = Benchmark(
    files={
        "questions": ("v2_OpenEnded_mscoco_{part}_questions.json",),
        "annotations": ("v2_mscoco_{part}_annotations.json",),
        "images": ("{part}",),
    },
    folders=("Questions", "Annotations", "Images/mscoco", "images"),
    splits={"train": ("train2014",), "validation": ("val2014",), "test": ("val2014",)},
    parts=("train2014", "val2014"),
    entries=_vqav2,
    ask=lambda entry: Asked(
        str(entry["question_id"]), entry["question"], _said(entry["answers"]), entry.get("answer_type", "")
    ),
)
"""VQA v2 (Goyal et al. 2017, arXiv 1612.00837), files and image names as github.com/GT-Vision-Lab/VQA has them."""


def _gqa(files: Files, part: str) -> Iterator[Entry]:
    for id, entry in json_entries(files["questions"]):
        yield {**entry, "id": id, "image": str(files["images"] / f"{entry['imageId']}.jpg")}


GQA = Benchmark(
    files={"questions": ("{part}_questions.json",), "images": ("images",)},
    folders=("questions", "questions1.2", "data"),
    splits={"train": ("train_balanced",), "validation": ("val_balanced",), "test": ("testdev_balanced",)},
    parts=("train_balanced", "val_balanced", "testdev_balanced", "val_all", "testdev_all"),
    entries=_gqa,
    ask=lambda entry: Asked(
        str(entry["id"]), entry["question"], [entry["answer"]], (entry.get("types") or {}).get("structural") or ""
    ),
)
"""GQA (Hudson and Manning 2019, arXiv 1902.09506), the files of ``questions1.2.zip`` and ``images.zip``; LLaVA
reports the balanced testdev split."""


def _textvqa(files: Files, part: str) -> Iterator[Entry]:
    read: dict[str, list[str]] = {}
    if "ocr" in files:
        read = {entry["image_id"]: entry["ocr_tokens"] for _, entry in json_entries(files["ocr"], "data")}
    for _, entry in json_entries(files["questions"], "data"):
        image = str(files["images"] / f"{entry['image_id']}.jpg")
        yield {**entry, "image": image, "ocr_tokens": read.get(entry["image_id"], [])}


TEXTVQA = Benchmark(
    files={"questions": ("TextVQA_0.5.1_{part}.json",), "images": ("train_images", "train_val_images/train_images")},
    splits={"train": ("train",), "validation": ("val",), "test": ("val",)},
    parts=("train", "val"),
    entries=_textvqa,
    ask=lambda entry: Asked(
        str(entry["question_id"]), entry["question"].capitalize(), _said(entry["answers"]), group=str(entry["image_id"])
    ),
)
"""TextVQA 0.5.1 (Singh et al. 2019, arXiv 1904.08920), files of textvqa.org; the images of both splits lie in
``train_images``."""


def _ask_with_ocr(entry: Entry) -> Asked:
    asked = TEXTVQA.ask(entry)
    return replace(asked, question=f"{asked.question}\nReference OCR token: {', '.join(entry['ocr_tokens'])}")


TEXTVQA_OCR = replace(
    TEXTVQA, files={**TEXTVQA.files, "ocr": ("TextVQA_Rosetta_OCR_v0.2_{part}.json",)}, ask=_ask_with_ocr
)
"""With the words that Rosetta read in the prompt, as LLaVA's published figures have it."""


def _vizwiz(files: Files, part: str) -> Iterator[Entry]:
    for _, entry in json_entries(files["annotations"]):
        yield {**entry, "id": entry["image"], "image": str(files["images"] / entry["image"])}


def _ask_vizwiz(entry: Entry) -> Asked:
    kind = entry.get("answer_type") or entry.get("category") or ""
    answerable = entry.get("answerable", kind != "unanswerable")
    id = entry.get("id") or entry["question_id"]
    group = "answerable" if answerable else "unanswerable"
    return Asked(str(id), entry["question"], _said(entry["answers"]), kind, group)


VIZWIZ = Benchmark(
    files={"annotations": ("{part}.json",), "images": ("{part}",)},
    folders=("Annotations", "annotations", "images"),
    splits={"train": ("train",), "validation": ("val",), "test": ("val",)},
    parts=("train", "val"),
    entries=_vizwiz,
    ask=_ask_vizwiz,
    prompt=SHORT.replace("\n", "\nWhen the provided information is insufficient, respond with 'Unanswerable'.\n"),
)
"""VizWiz-VQA (Gurari et al. 2018, arXiv 1802.08218), ``Annotations.zip`` and the images of vizwiz.org; LLaVA's
prompt."""


CLEVR_KINDS = {
    **{f"{relation}": "compare numbers" for relation in ("equal_integer", "less_than", "greater_than")},
    **{f"query_{attribute}": "query attribute" for attribute in ("color", "material", "shape", "size")},
    **{f"equal_{attribute}": "compare attribute" for attribute in ("color", "material", "shape", "size")},
}
"""By the last function of a question's program; ``count`` and ``exist`` are kinds by themselves (arXiv 1612.06890)."""


def _clevr(files: Files, part: str) -> Iterator[Entry]:
    for number, entry in json_entries(files["questions"], "questions"):
        yield {"question_index": number, **entry, "image": str(files["images"] / entry["image_filename"])}


def _ask_clevr(entry: Entry) -> Asked:
    program = entry.get("program") or []
    last = program[-1].get("function", program[-1].get("type", "")) if program else ""
    kind = CLEVR_KINDS.get(last, last)
    return Asked(str(entry["question_index"]), entry["question"], [entry["answer"]], kind)


CLEVR = Benchmark(
    files={"questions": ("questions/CLEVR_{part}_questions.json",), "images": ("images/{part}",)},
    folders=("CLEVR_v1.0",),
    splits={"train": ("train",), "validation": ("val",), "test": ("val",)},
    parts=("train", "val"),
    entries=_clevr,
    ask=_ask_clevr,
)
"""CLEVR v1.0 (Johnson et al. 2017, arXiv 1612.06890), the unpacked ``CLEVR_v1.0.zip``."""
