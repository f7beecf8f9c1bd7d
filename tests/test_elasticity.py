"""Random plans by axis, the room that a choice of plans leaves, and what a question says by itself."""

import json

import numpy as np
import pytest
import torch
from datasets import Dataset
from datasets import Image as ImageFeature

import maskgym.eval.__main__ as eval_main
from maskgym.backbones import EncodingBank, InputError
from maskgym.backbones.plans.masks import AXES
from maskgym.envs import load_queries
from maskgym.envs.data.queries import DatasetQueries
from maskgym.envs.data.scene_sentences import SENTENCE_ASKERS
from maskgym.envs.data.scenes_long import SHORT_ASKERS
from maskgym.eval.studies.elasticity import accuracy_by_axis, accuracy_by_kind, axes_table, kinds_table, room_for_choice
from maskgym.eval.studies.question_only import question_only_accuracy
from maskgym.policies.baselines import BASELINES, random_plans
from tests.conftest import command, make_dataset


@pytest.mark.parametrize("axis", AXES)
def test_random_plans_of_one_axis_leave_the_others_alone(small, source, axis):
    encoding = small.encode([source[number] for number in range(12)])
    budgets = torch.full((12,), 0.7, dtype=torch.float64)
    planner = BASELINES[f"random-{axis}"](small, 0)
    masks = planner.plan(encoding, budgets)
    assert planner.name == f"random-{axis}"
    for other in AXES:
        assert bool(getattr(masks, other).all()) == (other != axis)
    spent = small.cost(encoding, masks).llm / small.full_llm_flops(encoding)
    assert (spent <= 0.7).all() and spent.mean() > 0.5
    again = BASELINES[f"random-{axis}"](small, 0).plan(encoding, budgets)
    assert torch.equal(getattr(again, axis), getattr(masks, axis))
    assert len(set(map(tuple, getattr(masks, axis).flatten(1).tolist()))) > 1


def test_a_budget_that_one_axis_cannot_reach_is_named(small, source):
    encoding = small.encode([source[0]])
    budget = torch.tensor([0.1], dtype=torch.float64)
    with pytest.raises(InputError, match=r"budget 0\.1 is below .* cost when only tokens may be dropped"):
        random_plans(small, encoding, budget, torch.Generator().manual_seed(0), ("tokens",))


def test_records_by_axis(small, source):
    records = accuracy_by_axis(small, EncodingBank(small, source), shares=(0.8, 0.35))
    found = [(record["policy"], record["budget"]) for record in records]
    assert found[0] == ("full", 1.0) and ("random-tokens", 0.35) not in found
    assert {("random-tokens", 0.8), ("random-layers", 0.8), ("random-heads", 0.8), ("random", 0.35)} <= set(found)
    lines = axes_table(records).splitlines()
    assert len(lines) == 2 + 4 and "–" in lines[2] and "80 %" in lines[0] and "all three" in lines[-1]


def test_an_oracle_is_at_least_as_good_as_one_plan_for_all(small, source):
    """On a random model with 48 queries: the oracle is above the mean, and with a single plan there is no choice."""
    bank = EncodingBank(small, DatasetQueries(make_dataset(48), "made", "test"))
    generated = {}
    for plans in (1, 16):
        generated[plans] = room_for_choice(small, bank, 0.6, plans)
    assert generated[1]["random"] == generated[1]["oracle"] == pytest.approx(generated[1]["static"])
    assert generated[16]["oracle"] >= max(generated[16]["static"], generated[16]["random"])


def test_a_spread_meets_every_kind_where_kinds_come_in_a_fixed_order():
    rows = make_dataset(240).to_dict()
    rows["type"] = [str(number % 8) for number in range(240)]
    queries = DatasetQueries(Dataset.from_dict(rows).cast_column("image", ImageFeature()), "made", "test")
    some = queries.spread(60)  # a fixed step would be 4, and meet two kinds
    assert len(some) == 60 and set(some.kinds) == set(queries.kinds)
    ids = [some.text(number)[0] for number in range(60)]
    assert ids == [queries.spread(60).text(number)[0] for number in range(60)] and len(set(ids)) == 60
    assert queries.spread(500) is queries


def test_accuracy_by_kind_of_question(small):
    rows = make_dataset(12).to_dict()
    rows["type"] = ["a"] * 4 + ["b"] * 8
    queries = DatasetQueries(Dataset.from_dict(rows).cast_column("image", ImageFeature()), "made", "test")
    table = accuracy_by_kind(small, EncodingBank(small, queries), queries)
    assert [table[kind][1] for kind in ("all", "a", "b")] == [12, 4, 8]
    assert table["all"][0] == pytest.approx((4 * table["a"][0] + 8 * table["b"][0]) / 12)
    assert queries.spread(3).kinds == ["a", "b", "b"] and "| all " in kinds_table(table)


def asked(rule, count=400):
    rng = np.random.default_rng(0)
    rows = make_dataset(2).to_dict()
    words = [f"is it {'abc'[rng.integers(3)]}?" for _ in range(count)]
    made = {
        "image": [rows["image"][0]] * count,
        "question": words,
        "answers": [[rule(word, rng)] for word in words],
    }
    return DatasetQueries(Dataset.from_dict(made).cast_column("image", ImageFeature()), "made", "train")


@pytest.mark.slow
def test_a_question_only_model_finds_what_the_question_says_and_no_more():
    tells = asked(lambda question, rng: "yes" if "a" in question else "no")
    assert question_only_accuracy(tells, tells, steps=60).mean() == 1
    silent = [asked(lambda question, rng: str(rng.integers(4))) for _ in range(2)]
    assert question_only_accuracy(silent[0], asked(lambda q, rng: str(rng.integers(1, 5)))).mean() < 0.4


@pytest.mark.slow
def test_scenes_cannot_be_answered_without_the_image():
    train, test = (load_queries("scenes:images=1000", split) for split in ("train", "validation"))
    assert question_only_accuracy(train, test, steps=300).mean() <= 0.45


@pytest.mark.slow
def test_long_scenes_cannot_be_answered_without_the_image(monkeypatch, capsys, tmp_path):
    """By the command, kind by kind; half of the questions are short."""
    command(
        monkeypatch, eval_main.main, "question-only", "--data", "scenes-long:images=400", "--json", tmp_path / "q.json"
    )
    (figures,) = json.loads((tmp_path / "q.json").read_text())
    found = figures["kinds"]
    assert capsys.readouterr().out.count("\n") == 2 + len(found) and found["all"][1] == 8 * 400
    for kinds, most in ((SHORT_ASKERS, 0.45), (SENTENCE_ASKERS, 0.05)):
        assert np.average([found[kind][0] for kind in kinds], weights=[found[kind][1] for kind in kinds]) <= most


@pytest.mark.slow
def test_the_command_prints_and_writes_all_of_it(monkeypatch, capsys, place, tmp_path):
    options = ["--data", place / "data", "--plans", 3, "--oracle-queries", 6, "--json", tmp_path / "e.json"]
    command(monkeypatch, eval_main.main, "elasticity", "--backbone", place / "vlm", *options)
    printed = capsys.readouterr().out
    assert "without the image:" in printed and "3 random plans at 50 %" in printed and "oracle" in printed
    (figures,) = json.loads((tmp_path / "e.json").read_text())
    assert set(figures) == {"kinds", "question_only", "room", "records"}
    with pytest.raises(SystemExit) as caught:
        command(monkeypatch, eval_main.main, "elasticity", "--plans", 0)
    assert caught.value.code == 2
