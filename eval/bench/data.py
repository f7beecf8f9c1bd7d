"""What it takes to stream a benchmark: memory and speed over as many queries as VQAv2's validation split has."""

from __future__ import annotations

import json
import resource
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from PIL import Image

from maskgym.envs import load_queries

QUERIES = 200_000
IMAGES = 100
PART = "val2014"


def write_vqav2(root: Path, queries: int) -> None:
    """Made-up questions with ten answers each, in the official layout of VQAv2, a hundred images in turn.

    Args:
        root: a folder.
        queries: how many.
    """
    for image in range(IMAGES):
        place = root / PART / f"COCO_{PART}_{image:012d}.jpg"
        place.parent.mkdir(exist_ok=True)
        Image.new("RGB", (64, 48), (image, 2 * image, 255 - image)).save(place)

    def question(number: int) -> dict[str, Any]:
        return {"question_id": number, "image_id": number % IMAGES, "question": f"what is the number {number} there?"}

    def annotation(number: int) -> dict[str, Any]:
        answers = [{"answer": f"answer {number + each}", "answer_id": each} for each in range(10)]
        return {"question_id": number, "image_id": number % IMAGES, "answer_type": "other", "answers": answers}

    _write(root / f"v2_OpenEnded_mscoco_{PART}_questions.json", "questions", map(question, range(queries)))
    _write(root / f"v2_mscoco_{PART}_annotations.json", "annotations", map(annotation, range(queries)))


def _write(file: Path, member: str, entries: Iterator[dict[str, Any]]) -> None:
    with file.open("w", encoding="utf-8") as text:
        text.write(f'{{"info": {{}}, "{member}": [')
        for number, entry in enumerate(entries):
            text.write(("," if number else "") + json.dumps(entry))
        text.write("]}")


def bench_data(queries: int = QUERIES) -> tuple[str, float, str]:
    """By how many MB the process's own memory grows while every question is read, and every fiftieth image decoded.

    Args:
        queries: how many are made up.

    Returns:
        Name, figure and setting.
    """
    with tempfile.TemporaryDirectory() as folder:
        write_vqav2(Path(folder), queries)
        before, began = private_mb(), time.perf_counter()
        source = load_queries(f"vqav2:root={folder}", "validation")
        most, loaded = private_mb(), time.perf_counter()
        for number in range(len(source)):
            source.text(number)
            if number % 50 == 0:
                _ = source[number].image
            if number % 1000 == 0:
                most = max(most, private_mb())
        seconds = time.perf_counter() - loaded
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    setting = (
        f"{len(source):,} questions in VQAv2's layout, first read in {loaded - began:.0f} s, then "
        f"{len(source) / seconds:,.0f} a second; the process's peak is {peak:,.0f} MB"
    )
    return "stream_growth_mb", most - before, setting


def private_mb() -> float:
    """Memory that is the process's own, without files that are mapped; where it cannot be told, the peak of both."""
    status = Path("/proc/self/status")
    if status.is_file():
        for line in status.read_text(encoding="utf-8").splitlines():
            if line.startswith("RssAnon:"):
                return int(line.split()[1]) / 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
