"""A query that fails is named by its id and does not take the others with it: in an evaluation, an environment, a
training."""

import json
from dataclasses import replace

import datasets
import numpy as np
import pytest
import torch
from gymnasium.utils import seeding
from PIL import Image
from safetensors.torch import load_file
from trl import SFTTrainer

import maskgym.eval.__main__ as eval_main
import maskgym.training.backbone as train_backbone
import maskgym.training.gumbel as train_gumbel
import maskgym.training.rl as train_rl
from maskgym.backbones import EncodingBank, InputError
from maskgym.backbones.encodings.left_out import FEW, LeftOut
from maskgym.envs import MaskingCore, MaskingEnv, MaskingVecEnv, MaskingVectorEnv
from maskgym.envs.core import Slots
from maskgym.envs.data.queries import DatasetQueries, load_queries
from maskgym.eval.measure.evaluate import evaluate
from maskgym.policies.baselines import FullPlanner, RandomPlanner
from tests.conftest import build_of, command, make_dataset
from tests.refusals import said
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
    rows["question"] = [QUESTIONS.get(number, question) for number, question in enumerate(rows["question"])]
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


BUDGETS = (0.3, 1.0)


def drawn_by(seed, draws, source):
    """What a slot should draw: pairs from its own generator, without those whose query fails."""
    rng = seeding.np_random(seed)[0]
    found, missed = [], 0
    while len(found) < draws:
        number, budget = int(rng.integers(len(source))), np.float32(np.exp(rng.uniform(*np.log(BUDGETS))))
        if source.name == "broken" and number in BROKEN:
            missed += 1
        else:
            found.append((number, budget))
    return found, missed


@pytest.mark.parametrize("whole", [True, False], ids=["nothing fails", "five of twelve fail"])
def test_every_skin_draws_again_what_fails_and_nothing_else(small, source, broken_source, whole, capsys):
    """Null: with data that have no fault every draw counts, in the order in which it always came."""
    data = source if whole else broken_source
    options = {"backbone": small, "data": data, "budgets": BUDGETS, "max_failed": 0.9}
    expected, missed = zip(*(drawn_by(60 + slot, 6, data) for slot in range(4)), strict=True)
    assert bool(sum(missed)) == (not whole)
    vector, sb3 = MaskingVectorEnv(num_envs=4, **options), MaskingVecEnv(MaskingCore(**options), 4)
    sb3.seed(60)
    seen = [[vector.reset(seed=60)[0], sb3.reset()]]
    actions = np.ones((4, small.layout.size), np.int8)
    for _ in range(5):
        seen.append([vector.step(actions)[0], sb3.step(actions)[0]])
    cores = [vector.core, sb3.core]
    for slot, pairs in enumerate(expected):
        alone = MaskingEnv(**options)
        cores.append(alone.core)
        for step, pair in enumerate(pairs):
            skins = [{name: value[slot] for name, value in skin.items()} for skin in seen[step]]
            for observation in (*skins, alone.reset(seed=60 + slot if step == 0 else None)[0]):
                assert (int(observation["query"][0]), observation["budget"][0]) == pair
        assert (alone.core.left_out.drawn, alone.core.left_out.missed) == (6 + missed[slot], missed[slot])
    for core in cores[:2]:
        assert (core.left_out.drawn, core.left_out.missed) == (24 + sum(missed), sum(missed))
    named = [line.split(" failed: ")[0] for line in capsys.readouterr().err.splitlines()]
    assert sorted(named) == sorted(f"query 'q{number}'" for core in cores for number in core.left_out.numbers)


def test_plans_of_one_query_share_what_is_drawn_again(small, broken_source):
    slots = Slots(MaskingCore(small, broken_source, budgets=BUDGETS, max_failed=0.9), 6, plans_per_query=3)
    slots.seed(60)
    expected = [drawn_by(60 + group, 5, broken_source)[0] for group in range(2)]
    for step in range(5):
        slots.draw()
        assert slots.numbers.tolist() == [pairs[step][0] for pairs in expected for _ in range(3)]
        assert slots.budgets.tolist() == [pairs[step][1] for pairs in expected for _ in range(3)]


def test_an_environment_that_is_restored_leaves_out_and_counts_the_same(small, broken_source):
    options = {"data": broken_source, "budgets": BUDGETS, "max_failed": 0.9}
    venv, actions = MaskingVecEnv(MaskingCore(small, **options), 4), np.ones((4, small.layout.size), np.int8)
    venv.seed(3)
    venv.reset()
    venv.step(actions)
    saved = json.loads(json.dumps(venv.state()))
    expected = [venv.step(actions)[0]["query"].tolist() for _ in range(4)]
    again = MaskingVecEnv(MaskingCore(small, **options), 4)
    again.load_state(saved)
    assert [again.step(actions)[0]["query"].tolist() for _ in range(4)] == expected
    assert again.core.left_out.state() == venv.core.left_out.state() and again.core.left_out.missed
    del saved["left_out"]  # as older versions wrote it
    MaskingVecEnv(MaskingCore(small, **options), 4).load_state(saved)


def test_what_cannot_be_answered_or_observed_is_drawn_again_too(small, capsys):
    rows = make_dataset(6).cast_column("image", datasets.Image(decode=False)).to_dict()
    rows["answers"][1] = [""]
    rows["question"][4] = "red " * 70
    odd = DatasetQueries(datasets.Dataset.from_dict(rows), "odd", "train")
    for observation, kept in (("id", {0, 2, 3, 4, 5}), ("features", {0, 2, 3, 5})):
        core = MaskingCore(small, odd, observation=observation, max_failed=0.9)
        slots = Slots(core, 40)
        slots.seed(0)
        slots.draw()
        assert set(slots.numbers.tolist()) == kept
        slots.observe()
        core.step(slots.numbers, slots.budgets, np.ones((40, small.layout.size), np.int8))
    named = capsys.readouterr().err
    assert "query 'q1' failed: the answer '' of query 'q1' has no tokens" in named
    assert "query 'q4' failed: the prompt of query 'q4' has 7" in named
    with pytest.raises(InputError, match=r"the prompt of query 'q4' has 7\d text tokens"):
        core.observe(np.array([0, 4, 3]), np.full(3, 0.5))


def fails(*numbers):
    return lambda drawn: {number: f"{number} is\nbroken" for number in drawn if number in numbers}


@pytest.mark.parametrize(
    ("share", "missed", "drawn", "ends"),
    [
        (0.0, 1, 1000, True),
        (0.1, FEW, 30, False),
        (0.1, FEW + 1, 30, True),
        (0.1, FEW + 10, 300, False),
        (0.1, FEW + 11, 309, True),
    ],
)
def test_a_share_of_the_draws_may_fail_and_a_few_always(share, missed, drawn, ends):
    """Null of each case that ends: the one before it."""
    left_out = LeftOut(fails(7), str, share)
    good = drawn - missed
    left_out.count([0] * good, {})
    left_out.count([7] * (missed - 1), fails(7)([7] * (missed - 1)))
    if not ends:
        left_out.count([7], fails(7)([7]))
        return
    with pytest.raises(InputError, match=rf"{missed} of {drawn:,} queries drawn so far failed.*--max-failed {share:g}"):
        left_out.count([7], fails(7)([7]))


def test_failed_queries_are_named_once_counted_and_summed_up(capsys):
    left_out = LeftOut(fails(1, 3), lambda number: f"q{number}", 0.5)
    assert left_out.metrics() == {}
    left_out.say()
    draws = iter([[1, 0], [3], [1], [2]])
    assert left_out.draw(2, lambda places: next(draws)).tolist() == [2, 0]
    assert (left_out.drawn, left_out.missed, left_out.numbers) == (5, 3, [1, 3])
    left_out.say()
    lines = capsys.readouterr().err.splitlines()
    assert lines[:2] == ["query 'q1' failed: 1 is broken", "query 'q3' failed: 3 is broken"]
    assert lines[2:] == ["2 queries were left out of the training, failing: queries q1, q3"]
    with pytest.raises(InputError, match=r"max_failed is 1; it must be a share"):
        LeftOut(fails(), str, 1)


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


QUESTIONS = {7: "red " * 300, 8: "what is <image> ?"}
NAMES = {3: "half.png", 4: "nowhere.png"}


@pytest.fixture(scope="module")
def broken(place):
    """The twelve queries on disk, one file for all splits, five of them broken."""
    folder = place / "broken"
    folder.mkdir()
    rows = []
    for number, row in enumerate(make_dataset()):
        image, question = (
            NAMES.get(number, f"{number}.png"),
            {7: "red " * 300, 8: "what is <image> ?"}.get(number, row["question"]),
        )
        row["image"].save(folder / image)
        rows.append({"id": row["id"], "image": image, "question": question, "answers": row["answers"]})
    rows[1]["image"] = None
    (folder / NAMES[3]).write_bytes((folder / NAMES[3]).read_bytes()[:40])
    (folder / NAMES[4]).unlink()
    (folder / "queries.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder / "queries.jsonl"


SIZES = "--total-queries 48 --validate-every 16 --checkpoint-every 16 --test-budgets 0.7 --budgets 0.6 1 --batch-size 8"
TRAININGS = {
    "rl": (train_rl, train_rl.RunCallback, "_on_step", f"{SIZES} --envs 8 --plans-per-query 2 --rollout-steps 2"),
    "gumbel": (train_gumbel, train_gumbel.Trainer, "step", SIZES),
    "adallava": (train_gumbel, train_gumbel.Trainer, "step", f"{SIZES} --estimator adallava-l"),
    "backbone": (
        train_backbone,
        SFTTrainer,
        "training_step",
        "--steps 6 --images 4 --questions 2 --validate-every 2 --warmup 2 --vision-steps 0",
    ),
}


def lines(out):
    found = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name != "seconds"} for line in found]


class Killed(BaseException):
    pass


@pytest.mark.parametrize("training", TRAININGS)
@pytest.mark.slow
def test_a_training_goes_on_without_what_fails_and_resumes_exactly(
    monkeypatch, place, broken, tmp_path, capsys, training
):
    script, owner, method, options = TRAININGS[training]
    where = ["--backbone", place / "vlm", "--data", broken, "--max-failed", 0.9]
    command(monkeypatch, script.main, *where, *options.split(), "--out", tmp_path / "whole")
    error = capsys.readouterr().err
    left_out = [line["left_out"] for line in lines(tmp_path / "whole") if "left_out" in line]
    # of a backbone's training queries without an image are not drawn
    assert left_out == sorted(left_out) and left_out[-1] == (4 if training == "backbone" else 5)
    assert f"{left_out[-1]} queries were left out of the training, failing: queries q" in error
    for number, words in BROKEN.items():
        assert words in error
        # once for the training, and once for each bank of validation and test queries
        assert 1 <= error.count(f"query 'q{number}' failed: ") <= 4, error
    calls, once = [], getattr(owner, method)

    def dying(self, *arguments):
        calls.append(0)
        if len(calls) == 5:
            raise Killed
        return once(self, *arguments)

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(owner, method, dying)
        command(patch, script.main, *where, *options.split(), "--out", tmp_path / "killed")
    command(monkeypatch, script.main, "--out", tmp_path / "killed", "--resume")
    assert lines(tmp_path / "whole") == lines(tmp_path / "killed")
    weights = "model/model.safetensors" if training == "backbone" else "controller.safetensors"
    whole, killed = (load_file(tmp_path / name / weights) for name in ("whole", "killed"))
    assert all(torch.equal(whole[name], killed[name]) for name in whole)


@pytest.mark.parametrize("training", ["rl", "gumbel", "backbone"])
@pytest.mark.slow
def test_a_training_ends_where_more_fails_than_may(monkeypatch, place, broken, tmp_path, capsys, training):
    script, _, _, options = TRAININGS[training]
    where = ["--backbone", place / "vlm", "--data", broken, "--out", tmp_path / "run"]
    with pytest.raises(SystemExit) as caught:
        command(monkeypatch, script.main, *where, *options.split(), "--max-failed", 0)
    assert caught.value.code == 2
    error = said(capsys.readouterr().err)[-1]
    assert "queries drawn so far failed, more than the share --max-failed 0 allows (queries q" in error
    assert "mend them, leave them out, or allow more; the last: " in error
    with pytest.raises(SystemExit):
        command(monkeypatch, script.main, *where, *options.split(), "--max-failed", 1)
    assert "--max-failed is 1; it must be a share of the queries, at least 0 and below 1" in capsys.readouterr().err


@pytest.mark.slow
def test_a_vision_tower_learns_without_what_fails(monkeypatch, broken, tmp_path, capsys):
    options = "--steps 1 --images 2 --questions 1 --warmup 0 --vision-steps 2 --vision-images 6 --max-failed 0.9"
    command(monkeypatch, train_backbone.main, "--data", broken, "--out", tmp_path / "run", *options.split())
    assert "vision_loss" in lines(tmp_path / "run")[0]
    assert "query 'q4' failed: image " in capsys.readouterr().err


def test_what_was_mended_is_used_by_a_resumed_environment(small, source, broken_source):
    """Null: a core that has met the query goes on without it."""
    core = MaskingCore(small, broken_source, budgets=BUDGETS, max_failed=0.9)
    venv = MaskingVecEnv(core, 12)
    venv.seed(0)
    venv.reset()
    mended = core.left_out.numbers[0]
    again = MaskingVecEnv(MaskingCore(small, source, budgets=BUDGETS, max_failed=0.9), 12)
    again.load_state(venv.state())
    numbers = set()
    for _ in range(10):
        numbers |= set(again.step(np.ones((12, small.layout.size), np.int8))[0]["query"][:, 0].tolist())
    assert mended in numbers and mended in again.core.left_out.numbers


@pytest.mark.parametrize(
    "options",
    ["audit even --plans 2 --budgets 0.7", "elasticity --plans 2 --oracle-queries 4", "search-static --tries 2 --out"],
    ids=lambda options: options.split()[0],
)
@pytest.mark.slow
def test_other_commands_leave_out_what_fails(monkeypatch, place, broken, tmp_path, capsys, options):
    # what the question alone says takes long, and shows no image
    monkeypatch.setattr(eval_main, "question_only_accuracy", lambda *_, **__: np.zeros(1))
    out = [tmp_path / "static.json"] if options.endswith("--out") else ["--json", tmp_path / "records.json"]
    command(monkeypatch, eval_main.main, *options.split(), *out, "--backbone", place / "vlm", "--data", broken)
    error = capsys.readouterr().err
    assert all(error.count(f"query 'q{number}' failed: ") == 1 for number in BROKEN)
    records = json.loads(out[-1].read_text())
    if options.startswith("audit"):
        assert {record["n"] for record in records} == {len(GOOD)}
    if options.startswith("elasticity"):
        assert records[0]["kinds"]["all"][1] == len(GOOD)
