"""A query that fails is named by its id and does not take the others with it."""

import json
from dataclasses import replace

import datasets
import numpy as np
import pytest
import torch
from PIL import Image

from backbones import EncodingBank, InputError
from envs import MaskingCore
from envs.queries import DatasetQueries, load_queries
from eval.evaluate import evaluate
from policies.baselines import FullPlanner, RandomPlanner
from tests.conftest import build_of, make_dataset
from tests.test_queries import CountingEncoder

BROKEN = {
    1: "query 'q1' has no image",
    3: "half.png of query 'q3' cannot be decoded",
    4: "nowhere.png of query 'q4' does not exist",
    7: "the prompt of query 'q7' has ",
    8: "query 'q8': the prompt has 2 image placeholders",
}
GOOD = [0, 2, 5, 6, 9, 10, 11]


@pytest.fixture
def broken_source(tmp_path):
    """Twelve queries, five of them broken, each in its own way."""
    Image.new("RGB", (16, 16), "red").save(tmp_path / "whole.png")
    (tmp_path / "half.png").write_bytes((tmp_path / "whole.png").read_bytes()[:40])
    rows = make_dataset().cast_column("image", datasets.Image(decode=False)).to_dict()
    rows["image"][1] = None
    rows["image"][3] = {"path": str(tmp_path / "half.png"), "bytes": None}
    rows["image"][4] = {"path": str(tmp_path / "nowhere.png"), "bytes": None}
    rows["question"][7] = "red " * 300
    rows["question"][8] = "what is <image> ?"
    return DatasetQueries(datasets.Dataset.from_dict(rows).cast_column("image", datasets.Image()), "broken", "test")


def test_the_bank_gathers_what_can_be_gathered(small, broken_source):
    bank = EncodingBank(small, broken_source)
    encoding, numbers, failed = bank.gather_valid(range(12))
    assert numbers == GOOD and encoding.ids == [f"q{number}" for number in GOOD]
    assert set(failed) == set(BROKEN) and bank.failed == failed
    assert all(words in failed[number] for number, words in BROKEN.items()), failed
    expected = EncodingBank(small, broken_source).gather(GOOD)
    assert torch.equal(encoding.visual_BND, expected.visual_BND) and torch.equal(encoding.text_BTD, expected.text_BTD)
    assert bank.gather_valid([4, 4, 1]) == (None, [], {4: failed[4], 1: failed[1]})
    with pytest.raises(InputError, match="query number 12 does not exist"):
        bank.gather_valid([0, 12])


def test_gathering_what_is_valid_encodes_no_image_twice(small, broken_source):
    encoder = CountingEncoder(small)
    bank = EncodingBank(encoder, broken_source)
    bank.gather_valid(range(12))
    once = encoder.images
    assert once == 6  # of 0, 2, 5, 6 and 7, 8 and 9, 10 and 11
    bank.gather_valid(range(12))
    assert encoder.images == once


def test_evaluation_leaves_failed_queries_out_and_says_so_once(small, broken_source, capsys):
    bank = EncodingBank(small, broken_source)
    records = [
        record
        for planner in (FullPlanner(small), RandomPlanner(small))
        for record in evaluate(planner, small, bank, (0.6, 1.0), batch_size=5, progress=False)
    ]
    assert [(record["n"], record["failed"]) for record in records] == [(7, 5)] * 3
    lines = capsys.readouterr().err.splitlines()
    assert [line.split(" failed: ")[0] for line in lines] == [f"query 'q{number}'" for number in BROKEN]
    alone = evaluate(FullPlanner(small), small, EncodingBank(small, make_source(GOOD)), (1.0,), progress=False)[0]
    means = {key: value for key, value in records[0].items() if key not in ("failed", "data", "split")}
    assert means == {key: alone[key] for key in means} and alone["failed"] == 0
    assert capsys.readouterr().err == ""


def make_source(numbers):
    return DatasetQueries(make_dataset().select(numbers), "made", "train")


def test_many_failures_are_counted_not_listed(small, capsys):
    rows = make_dataset(30).cast_column("image", datasets.Image(decode=False)).to_dict()
    rows["image"][:14] = [None] * 14
    some = DatasetQueries(datasets.Dataset.from_dict(rows).cast_column("image", datasets.Image()), "made", "test")
    assert evaluate(FullPlanner(small), small, EncodingBank(small, some), (1.0,), progress=False)[0]["failed"] == 14
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 11 and lines[-1] == "... and 4 more"
    with pytest.raises(InputError, match="all 9 queries failed; the first, 'q0': query 'q0' has no image"):
        evaluate(FullPlanner(small), small, EncodingBank(small, some.head(9)), (1.0,), progress=False)


def test_the_environment_stops_at_a_failed_query_and_names_it(small, broken_source):
    core = MaskingCore(small, broken_source)
    actions = np.ones((2, small.layout.size), np.int8)
    core.step(np.array([0, 2]), np.ones(2), actions)
    for number, words in BROKEN.items():
        with pytest.raises(InputError, match=words):
            core.step(np.array([0, number]), np.ones(2), actions)


def test_prompts_that_an_observation_cannot_hold_are_named(small):
    rows = make_dataset(4).cast_column("image", datasets.Image(decode=False)).to_dict()
    rows["question"][2] = "red " * 70
    long = DatasetQueries(datasets.Dataset.from_dict(rows), "made", "train")
    core = MaskingCore(small, long, observation="features")
    with pytest.raises(InputError, match=r"the prompt of query 'q2' has 7\d text tokens"):
        core.observe(np.array([0, 2, 3]), np.full(3, 0.5))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda image: None, "query 'q0' has no image; every query needs one"),
        (lambda image: [image, image], "query 'q0' has 2 images in a list; one a query is supported"),
        (lambda image: [], "query 'q0' has 0 images in a list"),
        (lambda image: "a.png", "the image of query 'q0' is of type str; it must be a PIL image"),
    ],
)
def test_queries_without_one_image_are_named(small, source, change, words):
    query = source[0]
    with pytest.raises(InputError, match=words):
        small.encode([source[1], replace(query, image=change(query.image))])


def test_images_that_the_model_cannot_take_are_named(source):
    qwen = build_of("qwen2_5_vl")
    stripe = replace(source[0], id="stripe", image=Image.new("RGB", (2500, 2)))
    with pytest.raises(InputError, match=r"the processor refuses the image of query 'stripe' .*aspect ratio"):
        qwen.encode([source[1], stripe])
    image = source[0].image
    batch = qwen.family.process([image], [qwen.prompt("")])
    with pytest.raises(InputError, match="the image of query 'a' has 1 visual tokens, its prompt "):
        qwen.read_batch(batch, [torch.zeros(1, qwen.hidden)], ["a"])


def test_columns_of_several_images_are_named(tmp_path):
    image = Image.new("RGB", (8, 8))
    rows = {"image": [[image, image], [image]], "question": ["?"] * 2, "answers": [["red"]] * 2}
    with pytest.raises(InputError, match=r"the column 'image' is List\(.*it must hold one image a row"):
        DatasetQueries(datasets.Dataset.from_dict(rows), "made", "test")
    lines = [{"image": ["a.png", "b.png"], "question": "?", "answers": ["red"]}]
    (tmp_path / "many.jsonl").write_text("\n".join(map(json.dumps, lines)))
    with pytest.raises(InputError, match=r"the column 'image' is List\("):
        load_queries(str(tmp_path / "many.jsonl"), "test")


def test_a_path_may_be_missing_in_json_lines(tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    lines = [{"image": image, "question": "?", "answers": ["red"]} for image in (None, "a.png")]
    (tmp_path / "some.jsonl").write_text("\n".join(map(json.dumps, lines)))
    queries = load_queries(str(tmp_path / "some.jsonl"), "test")
    assert queries[1].image.size == (8, 8)
    with pytest.raises(InputError, match="query '0' has no image"):
        queries[0]
