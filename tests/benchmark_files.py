"""Benchmarks of a few entries each, in the official layouts, for tests."""

from __future__ import annotations

import base64
import io
import json
from pathlib import Path
from typing import Any

from PIL import Image


def picture(file: Path | None = None, color: str = "red", size: tuple[int, int] = (16, 16)) -> bytes:
    """A plain PNG or JPEG, by the file's suffix, written there if a file is given."""
    buffer = io.BytesIO()
    Image.new("RGB", size, color).save(buffer, "JPEG" if file is not None and file.suffix == ".jpg" else "PNG")
    if file is not None:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(buffer.getvalue())
    return buffer.getvalue()


def write(file: Path, content: Any) -> None:
    """JSON; of a list of lines, one object a line."""
    file.parent.mkdir(parents=True, exist_ok=True)
    text = content if isinstance(content, str) else json.dumps(content, ensure_ascii=False)
    file.write_text(text, encoding="utf-8")


def lines(entries: list[dict[str, Any]]) -> str:
    return "".join(json.dumps(entry) + "\n" for entry in entries)


def ten(*answers: tuple[str, int]) -> list[str]:
    return [answer for answer, times in answers for _ in range(times)]


VQAV2 = [
    (262148000, 262148, "Where is he looking?", "other", ten(("down", 8), ("at table", 1), ("skateboard", 1))),
    (262148001, 262148, "How many people?", "number", ten(("2", 3), ("two", 3), ("3", 4))),
    (393225000, 393225, "Is it a café?", "yes/no", ten(("yes", 10))),
]
"""Question id, image id, question, type and ten answers."""


def vqav2(root: Path, part: str = "val2014") -> None:
    head = {"info": {"version": "2.0"}, "license": {}, "data_subtype": part, "data_type": "mscoco"}
    questions = [{"image_id": image, "question": text, "question_id": id} for id, image, text, _, _ in VQAV2]
    annotations = [
        {
            "question_id": id,
            "image_id": image,
            "question_type": "what",
            "answer_type": kind,
            "multiple_choice_answer": answers[0],
            "answers": [
                {"answer": answer, "answer_confidence": "yes", "answer_id": number + 1}
                for number, answer in enumerate(answers)
            ],
        }
        for id, image, _, kind, answers in VQAV2
    ]
    write(
        root / f"v2_OpenEnded_mscoco_{part}_questions.json", {**head, "task_type": "Open-Ended", "questions": questions}
    )
    write(root / f"v2_mscoco_{part}_annotations.json", {**head, "annotations": annotations})
    for image, color in ((262148, "red"), (393225, "blue")):
        picture(root / part / f"COCO_{part}_{image:012d}.jpg", color)


def gqa(root: Path) -> None:
    entries = {
        id: {
            "imageId": "n1",
            "question": question,
            "answer": answer,
            "fullAnswer": f"It is {answer}.",
            "isBalanced": True,
            "types": {"structural": kind, "semantic": "attr"},
        }
        for id, question, answer, kind in (
            ("201307251", "Is it overcast?", "no", "verify"),
            ("201307252", "What color is the bed?", "white", "query"),
            ("201307253", "What is on the bed?", "comforter", "query"),
        )
    }
    write(root / "testdev_balanced_questions.json", entries)
    picture(root / "images" / "n1.jpg")


def textvqa(root: Path, ocr: bool = True) -> None:
    entries = [
        {
            "question_id": 34602,
            "image_id": "003a8ae2ef43b901",
            "question": "what is the brand of this camera?",
            "answers": ten(("nous les gosses", 1), ("dakota", 6), ("Dakota digital", 2), ("dakota's", 1)),
            "set_name": "val",
        }
    ]
    write(root / "TextVQA_0.5.1_val.json", {"dataset_type": "val", "dataset_name": "textvqa", "data": entries})
    if ocr:
        read = [{"image_id": "003a8ae2ef43b901", "ocr_tokens": ["DAKOTA", "DIGITAL", "é"], "ocr_info": []}]
        write(root / "TextVQA_Rosetta_OCR_v0.2_val.json", {"data": read})
    picture(root / "train_images" / "003a8ae2ef43b901.jpg")


def vizwiz(root: Path) -> None:
    entries = [
        {
            "image": f"VizWiz_val_{number:08d}.jpg",
            "question": question,
            "answers": [{"answer": answer, "answer_confidence": "yes"} for answer in answers],
            "answer_type": kind,
            "answerable": answerable,
        }
        for number, (question, answers, kind, answerable) in enumerate(
            [
                ("Ok. There is another picture?", ten(("unanswerable", 8), ("no", 2)), "unanswerable", 0),
                ("What is this?", ten(("basil leaves", 5), ("basil", 4), ("unanswerable", 1)), "other", 1),
                ("", ten(("unanswerable", 10)), "unanswerable", 0),
            ]
        )
    ]
    write(root / "Annotations" / "val.json", entries)
    for entry in entries:
        picture(root / "val" / str(entry["image"]))


def clevr(root: Path) -> None:
    entries = [
        {
            "split": "val",
            "image_index": 0,
            "image_filename": "CLEVR_val_000000.png",
            "question_index": number,
            "question": question,
            "answer": answer,
            "program": [{"function": "scene", "inputs": []}, {"function": function, "inputs": [0]}],
        }
        for number, (question, answer, function) in enumerate(
            [
                ("Are there more big green things than large balls?", "no", "greater_than"),
                ("How many cubes are there?", "2", "count"),
                ("What is the color of the ball?", "red", "query_color"),
                ("Is the cube as large as the ball?", "yes", "equal_size"),
            ]
        )
    ]
    write(root / "CLEVR_v1.0" / "questions" / "CLEVR_val_questions.json", {"info": {}, "questions": entries})
    picture(root / "CLEVR_v1.0" / "images" / "val" / "CLEVR_val_000000.png")


def pope(root: Path) -> None:
    for part, labels in (("random", "yynn"), ("popular", "yn"), ("adversarial", "yn")):
        entries = [
            {
                "question_id": number + 1,
                "image": "COCO_val2014_000000310196.jpg",
                "text": f"Is there a thing {number} in the image?",
                "label": {"y": "yes", "n": "no"}[label],
            }
            for number, label in enumerate(labels)
        ]
        write(root / f"coco_pope_{part}.json", lines(entries))
    picture(root / "val2014" / "COCO_val2014_000000310196.jpg")


def mme(root: Path) -> None:
    from maskgym.envs.data.benchmarks.metrics import MME_SUBTASKS

    below = root / "MME_Benchmark_release_version"
    for subtasks in MME_SUBTASKS.values():
        for subtask in subtasks:
            apart = subtask in ("artwork", "celebrity", "landmark", "posters", "scene")
            texts, images = ("questions_answers_YN", "images") if apart else ("", "")
            for number in range(2 if subtask == "count" else 1):
                asked = [f"Are there {number}? Please answer yes or no.\tYes"]
                asked += [f"Is it é{number}? Please answer yes or no.\tNo"]
                write(below / subtask / texts / f"000{number}.txt", "\n".join(asked) + "\n")
                picture(below / subtask / images / f"000{number}.{'jpg' if number else 'png'}")


def nlvr2(root: Path) -> None:
    entries = [
        {"identifier": f"dev-850-{pair}-0", "sentence": "There are two dogs.", "label": label, "writer": "1"}
        for pair, label in ((0, "True"), (1, "False"))
    ]
    entries.append({"identifier": "dev-850-0-1", "sentence": "One dog sits.", "label": "False", "writer": "2"})
    write(root / "data" / "dev.json", lines(entries))
    for pair in (0, 1):
        picture(root / "dev" / f"dev-850-{pair}-img0.png", "red", (20, 10))
        picture(root / "dev" / f"dev-850-{pair}-img1.png", "blue", (20, 20))


def scienceqa(root: Path) -> None:
    problem = {"hint": "", "task": "closed choice", "grade": "grade2", "subject": "natural science", "lecture": ""}
    choices = ["West Virginia", "Louisiana", "Arizona"]
    problems = {
        "1": {**problem, "question": "No image?", "choices": choices, "answer": 0, "image": None, "split": "test"},
        "5": {**problem, "question": "Farthest north?", "choices": choices, "answer": 1, "image": "image.png"},
        "11": {
            **problem,
            "question": "Which?",
            "choices": ["é", "b"],
            "answer": 0,
            "image": "image.png",
            "hint": "Look.",
        },
        "12": {**problem, "question": "Of another split", "choices": choices, "answer": 0, "image": "image.png"},
    }
    write(root / "problems.json", problems)
    write(root / "pid_splits.json", {"train": ["12"], "val": [], "test": ["1", "5", "11"]})
    for id in ("5", "11"):
        picture(root / "images" / "test" / id / "image.png")


def mmbench(root: Path) -> None:
    """One question in four orders of its options, the later images by number, and one in two."""
    head = ["index", "question", "hint", "A", "B", "C", "D", "answer", "category", "image", "source", "l2-category"]
    image = base64.b64encode(picture()).decode()
    rows = []
    animals = ["cat", "dog", "a small cow", "hen"]
    for turn in range(4):
        options = animals[turn:] + animals[:turn]
        answer = "ABCD"[options.index("dog")]
        shown = image if turn == 0 else 241
        rows.append([241 + turn * 10**6, 'Which "animal"?', "nan", *options, answer, "attr", shown])
    for turn in range(2):
        options = ["yes", "no"][turn:] + ["yes", "no"][:turn]
        answer = "AB"[options.index("no")]
        rows.append([252 + turn * 10**6, "Is it?", "Look at\nit.", *options, "", "", answer, "scene", image])
    table = [head, *([*row, "web", f"l2-{row[8]}"] for row in rows)]
    cell = '"{}"'.format
    text = "\n".join("\t".join(cell(str(value).replace('"', '""')) for value in row) for row in table)
    write(root / "mmbench_dev_20230712.tsv", text + "\n")
