"""Images and columns that are not what they should be: refused by name, or taken where they are only odd."""

from __future__ import annotations

import io
import struct
import sys
import zlib

import datasets
import numpy as np
import pytest
from PIL import Image

from maskgym.backbones import EncodingBank, InputError
from maskgym.backbones.encodings.images import read_image
from maskgym.envs.data.queries import DatasetQueries
from maskgym.eval import cli
from tests.conftest import make_dataset
from tests.refusals import PROGRAMS, Line, check_line

pytestmark = pytest.mark.slow

FORMATS = ("PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP", "PPM")


def drawn(mode: str = "RGB", size: tuple[int, int] = (40, 30)) -> Image.Image:
    noise = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(noise).convert(mode)


def encoded(image: Image.Image, format: str, **options) -> bytes:
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


def png_of_size(width: int, height: int) -> bytes:
    """A PNG that says that it is so large, and holds nothing."""
    head = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + head + struct.pack(">I", zlib.crc32(head))


CUT = {
    f"{format} cut at {tenth}/10": whole[: len(whole) * tenth // 10]
    for format in FORMATS
    for whole in [encoded(drawn(), format)]
    for tenth in range(10)
}
"""Files that end too early. A few formats can do without their last bytes, so nine tenths is the most."""

BROKEN = {
    "text called png": b"This is a text.",
    "web page": b"<!DOCTYPE html><html><body>404</body></html>",
    "zip": b"PK\x03\x04" + bytes(100),
    "zeros": bytes(1000),
    "head of a png": b"\x89PNG\r\n\x1a\n",
    "head of a jpeg": b"\xff\xd8\xff\xe0",
    "decompression bomb": png_of_size(50_000, 50_000),
    "bomb by width": png_of_size(2**31 - 1, 1),
    "no width": png_of_size(0, 10),
    "wrong check sum": encoded(drawn(), "PNG")[:40] + b"XX" + encoded(drawn(), "PNG")[42:],
}


@pytest.mark.parametrize("name", [*CUT, *BROKEN])
@pytest.mark.filterwarnings("ignore:Corrupt EXIF data", "ignore:Truncated File Read")
def test_broken_images(name, tmp_path):
    content = {**CUT, **BROKEN}[name]
    with pytest.raises(InputError, match=r"image a.png cannot be decoded \(.*\); replace or remove it") as caught:
        read_image(io.BytesIO(content), "image a.png")
    (tmp_path / "a.png").write_bytes(content)
    with pytest.raises(InputError, match="cannot be decoded"):
        read_image(tmp_path / "a.png", "image a.png")
    assert "\n" not in str(caught.value)


ODD = {
    "16 bits": encoded(Image.fromarray(np.arange(1200, dtype=np.uint16).reshape(30, 40)), "PNG"),
    "pages": encoded(drawn(), "TIFF", save_all=True, append_images=[drawn()]),
    "one pixel": encoded(Image.new("RGB", (1, 1)), "PNG"),
    "a thin line": encoded(Image.new("RGB", (400, 1)), "PNG"),
}
"""What a VLM is to take; ``test_image_kinds`` has what is seen of every kind."""


@pytest.mark.parametrize("name", ODD)
def test_odd_images_are_taken(name, small):
    image = read_image(io.BytesIO(ODD[name]), "image")
    rows = {"image": [image], "question": ["what?"], "answers": [["red"]]}
    queries = DatasetQueries(datasets.Dataset.from_dict(rows).cast_column("image", datasets.Image()), "odd", "test")
    assert image.mode == "RGB" and len(EncodingBank(small, queries).gather([0])) == 1


def rows(**columns):
    return {"image": [drawn()] * 2, "question": ["a?", "b?"], "answers": [["red"], ["blue"]], **columns}


COLUMNS = [
    ("no columns", {}, "lacks the column 'image'"),
    ("no question", {key: rows()[key] for key in ("image", "answers")}, "lacks the column 'question'"),
    ("no image", {key: rows()[key] for key in ("question", "answers")}, "lacks the column 'image'"),
    ("columns in capitals", {key.upper(): value for key, value in rows().items()}, "lacks the column 'image'"),
    ("answers: none", rows(answers=[["red"], None]), "row 1: answers is None"),
    ("answers: all none", rows(answers=[None, None]), "row 0: answers is None"),
    ("answers: empty", rows(answers=[["red"], []]), "row 1: answers is []"),
    ("answers: all empty", rows(answers=[[], []]), "row 0: answers is []"),
    ("answers: a hole", rows(answers=[["red", None], ["blue"]]), "row 0: answers is ['red', None]"),
    ("answers: lists of lists", rows(answers=[[["red"]], [["blue"]]]), "row 0: answers is [['red']]"),
    ("answers: a mapping", rows(answers=[{"a": "red"}, {"a": "blue"}]), "row 0: answers is {'a': 'red'}"),
    ("question: none", rows(question=["a?", None]), "row 1: question is None"),
    ("question: list", rows(question=[["a?"], ["b?"]]), "row 0: question is ['a?']"),
    ("question: mapping", rows(question=[{"q": "a?"}, {"q": "b?"}]), "row 0: question is {'q': 'a?'}"),
    ("image: numbers", rows(image=[1, 2]), "column 'image'"),
    ("image: lists", rows(image=[["a.png"], ["b.png"]]), "column 'image'"),
    ("scoring: unknown", rows(scoring=["vqav2", "bleu"]), "scoring is 'bleu'"),
    ("scoring: a number", rows(scoring=[1, 2]), "scoring is '1'"),
    ("no rows", {"image": [], "question": [], "answers": []}, "has no rows"),
]


@pytest.mark.parametrize(("columns", "words"), [pytest.param(*case[1:], id=case[0]) for case in COLUMNS])
def test_bad_columns(columns, words):
    with pytest.raises(InputError) as caught:
        DatasetQueries(datasets.Dataset.from_dict(columns), "mine", "test")
    assert words in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "question",
    ["", " ", "\x00\x01\x1b[31m", "\u202eright to left", "\U0001f9d1\u200d\U0001f52c?", "ä" * 30, "\n\n\t", "</s><s>"],
)
def test_odd_questions_are_taken(question, small):
    queries = DatasetQueries(
        datasets.Dataset.from_dict(rows(question=[question, "b?"])).cast_column("image", datasets.Image()),
        "odd",
        "test",
    )
    encoding = EncodingBank(small, queries).gather([0, 1])
    assert len(small.answer(encoding, small.full(encoding)).texts) == 2


@pytest.fixture(scope="module")
def shelf(desk):
    """Data sets of no query, of one, and of queries that all fail."""
    folder = desk["place"] / "shelf"
    folder.mkdir()
    undecoded = make_dataset(4).cast_column("image", datasets.Image(decode=False))
    failing = {**undecoded.to_dict(), "image": [{"path": None, "bytes": b"rubbish %d" % n} for n in range(4)]}
    long = {**make_dataset(4).to_dict(), "question": ["red " * 5000] * 4}
    features = make_dataset(1).features
    named = {"one": make_dataset(1)}
    named["failing"] = datasets.Dataset.from_dict(failing, features=features)
    named["long"] = datasets.Dataset.from_dict(long, features=features)
    for name, dataset in named.items():
        dataset.save_to_disk(folder / name)
    none = make_dataset(1).select([])
    none.save_to_disk(folder / "none")
    none.to_parquet(folder / "none.parquet")
    (folder / "none.jsonl").touch()
    (folder / "none.json").write_text("[]")
    (folder / "untested").mkdir()
    for split in ("train", "validation", "test"):
        (none if split == "test" else make_dataset(4)).to_parquet(folder / "untested" / f"{split}.parquet")
    return {**desk, **{path.name.replace(".", "-"): path for path in folder.iterdir()}}


SMALL = "--backbone {vlm} --out run --total-queries 4 --validate-queries 2 --test-queries 2 --test-budgets 0.9"
FAILING = [
    Line(f"{program} {options} --data {{{data}}}", words)
    for data, words in (
        ("failing", "cannot be decoded (it is in no known image format)"),
        ("long", "shorten the question"),
    )
    for program, options in (
        ("train_rl", f"{SMALL} --envs 4 --plans-per-query 2 --batch-size 4"),
        ("train_gumbel", f"{SMALL} --batch-size 2"),
        ("eval run full even", "--backbone {vlm}"),
        ("eval tune fastv:k=1", "--backbone {vlm}"),
        ("eval latency full", "--backbone {vlm}"),
        ("eval audit random", "--backbone {vlm} --plans 0"),
        ("eval demo even", "--backbone {vlm} --port 18765"),
        ("eval search-static", "--backbone {vlm} --out static.json"),
        ("eval elasticity", "--backbone {vlm}"),
        ("eval scale-out", "--backbone {vlm} --rows 2 --repeats 1"),
    )
]


BACKBONE = "train_backbone --out run --backbone {vlm} --steps 1 --images 2 --questions 1 --warmup 0"
FAILING.append(Line(f"{BACKBONE} --data {{failing}}", "cannot be decoded"))
FAILING.append(Line(f"{BACKBONE} --data {{long}}", "shorten the question"))

PPO = f"train_rl {SMALL} --envs 4 --plans-per-query 2 --batch-size 4"
GUMBEL = f"train_gumbel {SMALL} --batch-size 2"
EXPERIMENT = "eval experiment training --backbone {vlm} --out out --budgets 0.7 1 --arms full random --seeds 0"
WHATEVER = {
    PPO: "validation",
    GUMBEL: "validation",
    BACKBONE: "train",
    EXPERIMENT: "test",
    "eval run full random --backbone {vlm} --budgets 0.7 --timing 1": "test",
    "eval tune fastv:k=1 --backbone {vlm} --budgets 0.7": "validation",
    "eval latency full --backbone {vlm} --repeats 2": "test",
    "eval search-static --backbone {vlm} --out static.json --tries 2": "validation",
    "eval elasticity --backbone {vlm} --plans 2": "train",
    "eval question-only": "train",
    "eval scale-out --backbone {vlm} --rows 2 --repeats 1 --steps 2": "validation",
    "eval audit random --backbone {vlm} --budgets 0.7 --plans 2": "test",
}
"""Commands that read data, each with the split that it opens first."""

EMPTY = [
    *(
        Line(f"{command} --data {{{data}}}", f"split '{split}' has no rows; name data that have one or more")
        for command, split in WHATEVER.items()
        for data in ("none", "none-parquet", "none-jsonl")
    ),
    Line(f"{PPO} --data {{none-json}}", "split 'validation' has no rows"),
    Line(f"{PPO} --data {{untested}}", "split 'test' has no rows"),
    Line(f"{GUMBEL} --data {{untested}}", "split 'test' has no rows"),
    Line("eval audit random --backbone {vlm} --budgets 0.7 --data {one}", "has a single image here"),
]


@pytest.mark.parametrize("line", EMPTY, ids=lambda line: line.command.split(" --")[0] + line.command[-16:])
@pytest.mark.filterwarnings("ignore:You have specified a mini-batch size")
def test_data_without_a_query(line, monkeypatch, capsys, shelf):
    """Before any work, in whatever form they lie there."""
    check_line(line, monkeypatch, capsys, shelf["place"], shelf)


@pytest.mark.parametrize("command", [each for each in WHATEVER if "audit" not in each])
@pytest.mark.filterwarnings("ignore:You have specified a mini-batch size")
def test_a_single_query_is_enough(command, monkeypatch, capsys, shelf, tmp_path):
    """All commands but the audit, which needs another image to show; what has no value is left out, not nan."""
    monkeypatch.chdir(tmp_path)
    program, *arguments = [part.format(**shelf) for part in f"{command} --data {{one}}".split()]
    monkeypatch.setattr(sys, "argv", [program, *arguments])
    cli.run(PROGRAMS[program])
    assert "nan" not in capsys.readouterr().out


@pytest.mark.parametrize("line", FAILING, ids=lambda line: line.command.split(" --backbone")[0] + line.command[-10:])
def test_data_without_a_query_that_works(line, monkeypatch, capsys, shelf):
    check_line(line, monkeypatch, capsys, shelf["place"], shelf)
