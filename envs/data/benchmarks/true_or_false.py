"""Benchmarks whose answers are yes or no, or true or false: POPE, MME, NLVR2."""

from __future__ import annotations

from collections.abc import Iterator

from maskgym.common.errors import InputError
from maskgym.envs.data.benchmarks.layout import SHORT, Asked, Benchmark, Entry, Files
from maskgym.envs.data.benchmarks.metrics import MME_SUBTASKS
from maskgym.envs.data.benchmarks.reading import json_lines


def _pope(files: Files, part: str) -> Iterator[Entry]:
    for entry in json_lines(files["questions"]):
        yield {**entry, "category": part, "image": str(files["images"] / entry["image"])}


def _ask_pope(entry: Entry) -> Asked:
    question, label = entry.get("text", entry.get("question")), entry.get("label", entry.get("answer"))
    if question is None or label is None:
        raise KeyError("text" if question is None else "label")
    return Asked(f"{entry['category']}-{entry['question_id']}", question, [label], entry["category"])


_POPE_PARTS = ("random", "popular", "adversarial")

POPE = Benchmark(
    files={"questions": ("coco_pope_{part}.json",), "images": ("val2014",)},
    folders=("coco", "output/coco", "images"),
    splits={"test": _POPE_PARTS},
    parts=_POPE_PARTS,
    entries=_pope,
    ask=_ask_pope,
)
"""POPE (Li et al. 2023, arXiv 2305.10355), ``output/coco`` of github.com/AoiDragon/POPE and COCO's val2014 images."""


def _mme(files: Files, part: str) -> Iterator[Entry]:
    """Of every text file of a subtask, two lines ``question<TAB>Yes|No``; its image has the same name, and lies
    beside it, or in ``images`` where the texts lie in ``questions_answers_YN``."""
    folder = files["questions"]
    apart = folder / "questions_answers_YN"
    texts, images = (apart, folder / "images") if apart.is_dir() else (folder, folder)
    for file in sorted(texts.glob("*.txt")):
        suffixes = (".jpg", ".png", ".jpeg", ".JPG", ".PNG")
        places = [images / f"{file.stem}{suffix}" for suffix in suffixes]
        image = next((place for place in places if place.is_file()), places[0])
        for line in filter(None, map(str.strip, file.read_text(encoding="utf-8").splitlines())):
            question, tab, answer = line.rpartition("\t")
            if not tab or answer.strip().lower() not in ("yes", "no"):
                raise InputError(f"{str(file)!r}: the line {line!r:.80} is not a question, a tab, and Yes or No")
            name = f"{part}/{image.name}"
            yield {"question_id": name, "question": question, "answer": answer, "category": part, "image": str(image)}


_MME_PARTS = tuple(subtask for subtasks in MME_SUBTASKS.values() for subtask in subtasks)

MME = Benchmark(
    files={"questions": ("{part}",)},
    folders=("MME_Benchmark_release_version", "MME_Benchmark_release_version/MME_Benchmark", "MME_Benchmark"),
    splits={"test": _MME_PARTS},
    parts=_MME_PARTS,
    entries=_mme,
    ask=lambda entry: Asked(
        f"{entry['question_id']}: {entry['question']}",
        entry["question"].strip(),
        [entry["answer"].strip()],
        entry["category"],
        str(entry["question_id"]),
    ),
    replaced="Please answer yes or no.",
)
"""MME (Fu et al. 2023, arXiv 2306.13394), ``MME_Benchmark_release_version``."""


def _nlvr2(files: Files, part: str) -> Iterator[Entry]:
    for entry in json_lines(files["sentences"]):
        pair = entry["identifier"].rpartition("-")[0]
        below = files["images"] / str(entry["directory"]) if "directory" in entry else files["images"]
        left, right = (str(below / f"{pair}-img{side}.png") for side in (0, 1))
        yield {**entry, "image": left, "beside": right}


def _ask_nlvr2(entry: Entry) -> Asked:
    id = str(entry.get("identifier", entry.get("question_id")))
    split, set_id, _, sentence = id.split("-") if id.count("-") == 3 else ("", id, "", "")
    label = str(entry["label"] if "label" in entry else entry["answer"])
    question = entry["sentence"] if "sentence" in entry else entry["question"]
    return Asked(id, question, [label], group=f"{split}-{set_id}-{sentence}")


NLVR2 = Benchmark(
    files={"sentences": ("{part}.json",), "images": ("images/{part}", "{part}")},
    folders=("data", "nlvr2", "nlvr2/data"),
    splits={"train": ("train",), "validation": ("dev",), "test": ("test1",)},
    parts=("train", "dev", "test1", "test2"),
    entries=_nlvr2,
    ask=_ask_nlvr2,
    prompt=SHORT.replace(
        "{question}", "The picture shows a left and a right photograph. True or false of them: {question}"
    ),
    images={"left_image": "image", "right_image": "beside"},
)
"""NLVR2 (Suhr et al. 2019, arXiv 1811.00491), ``nlvr2/data`` of github.com/lil-lab/nlvr and its images; both
photographs are shown in one picture, and the prompt is ours, for LLaVA has none."""
