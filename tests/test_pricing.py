"""--answer-tokens and --hard-budgets: what commands price plans at, what is kept with a controller, what is cut."""

import json
import re

import pytest
import yaml

import maskgym.eval.__main__ as eval_main
import maskgym.eval.pricing as pricing
import maskgym.training.gumbel as train_gumbel
from maskgym import AdaptiveVLM
from maskgym.backbones import EncodingBank, load_backbone
from maskgym.backbones.expected_length import numbers_of
from maskgym.common.errors import InputError
from maskgym.envs.data.expected_length import mean_length
from maskgym.envs.data.queries import load_queries
from maskgym.eval.experiment.command import Experiment
from maskgym.eval.policies import expectation_of, load_planner
from maskgym.eval.pricing import Pricing
from maskgym.policies.controller.learned import load_controller
from tests.conftest import build, command
from tests.hostile import a_run, edit
from tests.test_expected_length import TREE

LONG = "scenes-long:size=64,images=40"
SHORT = "scenes:size=32,images=2"


@pytest.fixture(scope="module")
def vlm():
    return build()


@pytest.fixture(scope="module")
def asked():
    return load_queries(LONG, "test", 16)


def priced(vlm, asked, monkeypatch, how, *policies, data=LONG, **options):
    monkeypatch.setattr(vlm, "expected_answer_tokens", 7)
    Pricing(answer_tokens=how).price(vlm, data, asked, policies, **options)
    return vlm.expected_answer_tokens


def test_what_is_asked_for_is_what_plans_are_priced_at(vlm, asked, monkeypatch, capsys):
    mean = mean_length(vlm, load_queries(LONG, "train"))
    assert mean > 2
    capsys.readouterr()  # where the data were made just now, that was said
    said = {}
    for how in (4, "mean", "predicted", None):
        said[how] = priced(vlm, asked, monkeypatch, how), capsys.readouterr().err
    assert said[4] == (4, "plans are priced at 4 tokens an answer (as asked for)\n")
    assert said["mean"] == (mean, f"plans are priced at {mean} tokens an answer (the mean of {LONG} train)\n")
    tree, line = said["predicted"]
    assert said[None] == (tree, line) and min(numbers_of(tree)) < mean < max(numbers_of(tree))
    fewest, most = min(numbers_of(tree)), max(numbers_of(tree))
    expected = f"plans are priced at {fewest} to {most} tokens an answer (expected of each question by {LONG} train)\n"
    assert line == expected
    encoding = EncodingBank(vlm, asked).gather(range(16))
    assert len(set(encoding.expected_tokens.tolist())) > 2


def test_answers_of_one_token_are_priced_so_without_a_look_at_the_training_split(vlm, asked, monkeypatch, capsys):
    short = load_queries(SHORT, "test")
    monkeypatch.setattr(pricing, "load_queries", None)
    assert priced(vlm, short, monkeypatch, None, data=SHORT) == 1
    assert priced(vlm, asked, monkeypatch, None, max_new_tokens=1) == 1
    assert capsys.readouterr().err == ""


def test_data_that_lets_nothing_be_expected(vlm, asked, monkeypatch, tmp_path, capsys):
    nowhere = str(tmp_path)
    assert priced(vlm, asked, monkeypatch, None, data=nowhere) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("plans are priced at 1 token an answer: no longer one can be expected (")
    for how in ("mean", "predicted"):
        with pytest.raises(InputError, match="could not be read"):
            priced(vlm, asked, monkeypatch, how, data=nowhere)


# What is kept with a controller


@pytest.fixture(scope="module")
def runs(place, tmp_path_factory):
    """Runs that priced plans at one token, as older ones did, and by a tree."""
    folder = tmp_path_factory.mktemp("runs")
    for name, expected in (("one", None), ("tree", TREE)):
        a_run(folder / name, place / "vlm")
        if expected is not None:
            edit(folder / name / "controller.json", expected_answer_tokens=expected)
    return folder


def test_a_controller_is_loaded_at_its_price(runs, vlm, asked, monkeypatch, tmp_path, capsys):
    assert priced(vlm, asked, monkeypatch, None, str(runs / "tree"), "full") == TREE
    assert "(as the controller was trained)" in capsys.readouterr().err
    assert priced(vlm, asked, monkeypatch, None, f"stride then {runs / 'one'}@merge") == 1
    whole = AdaptiveVLM.from_pretrained(runs / "tree")
    assert whole.backbone.expected_answer_tokens == TREE
    whole.save_pretrained(tmp_path / "saved")
    assert AdaptiveVLM.from_pretrained(tmp_path / "saved").backbone.expected_answer_tokens == TREE
    assert json.loads((tmp_path / "saved" / "controller.json").read_text())["expected_answer_tokens"] == TREE
    assert expectation_of([str(tmp_path / "saved"), str(runs / "tree")]) == TREE
    AdaptiveVLM.from_pretrained(runs / "one").save_pretrained(tmp_path / "plain")
    assert "expected_answer_tokens" not in json.loads((tmp_path / "plain" / "controller.json").read_text())
    assert "priced" not in capsys.readouterr().err


def test_another_price_than_the_controllers_is_said(runs, place, vlm, asked, monkeypatch, capsys):
    both = [str(runs / name) for name in ("tree", "one")]
    with pytest.raises(InputError, match="2 to 5 tokens and 1 token; give --answer-tokens, or"):
        priced(vlm, asked, monkeypatch, None, *both)
    assert priced(vlm, asked, monkeypatch, 4, *both) == 4
    capsys.readouterr()
    backbone = load_backbone(str(place / "vlm"), expected_answer_tokens=4)
    for name, trained in (("tree", "2 to 5 tokens"), ("one", "1 token")):
        assert load_planner(str(runs / name), backbone, 0).budgeted
        said = f"was trained with plans priced at {trained} an answer; here they are priced at 4 tokens\n"
        assert capsys.readouterr().err.endswith(said)


@pytest.mark.parametrize(
    "odd",
    [0, -1, 1.5, "3", None, 10**30, {}, {"word": "a", "with": 1}, {"word": 3, "with": 1, "without": 2}, [2]],
    ids=str,
)
def test_a_price_that_is_none_is_refused(runs, place, tmp_path, odd):
    run = a_run(tmp_path / "run", place / "vlm")
    edit(run / "controller.json", expected_answer_tokens=odd)
    with pytest.raises(InputError, match="expected_answer_tokens is "):
        load_controller(run, build())
    with pytest.raises(InputError, match="expected_answer_tokens is "):
        AdaptiveVLM.from_pretrained(run)


def test_a_tree_without_end_is_refused():
    deep = 1
    for _ in range(65):
        deep = {"word": "a", "with": deep, "without": 1}
    with pytest.raises(InputError, match="a tree of at most 64 words"):
        build(expected_answer_tokens=deep)
    build(expected_answer_tokens=deep["with"])


# Commands


def records(monkeypatch, place, tmp_path, *options):
    where = ["--backbone", place / "vlm", "--data", LONG, "--limit", 12, "--json", tmp_path / "records.json"]
    command(monkeypatch, eval_main.main, "run", *options, *where)
    return json.loads((tmp_path / "records.json").read_text())


def test_an_evaluation_reports_what_is_spent_and_cuts_when_told(monkeypatch, place, tmp_path, capsys):
    """The null: budgets are soft unless it is told, and at one token nothing is kept for what comes."""
    given = ("even", "--budgets", 0.7)
    (soft,) = records(monkeypatch, place, tmp_path, *given)
    out, err = capsys.readouterr()
    assert "spent %" in out and "overspent %" in out and "cut %" not in out
    assert len(re.findall(r"plans are priced at \d+ to \d+ tokens an answer", err)) == 1
    (hard,) = records(monkeypatch, place, tmp_path, *given, "--hard-budgets")
    assert "cut %" in capsys.readouterr().out
    (one,) = records(monkeypatch, place, tmp_path, *given, "--answer-tokens", 1)
    assert soft["overspent"] > 0 == hard["overspent"] and hard["cut"] > 0
    assert hard["spent_llm_flops_ratio"] <= 0.7 and hard["llm_flops_ratio"] == soft["llm_flops_ratio"]
    assert one["spent_llm_flops_ratio"] > soft["spent_llm_flops_ratio"] and one["expected_tokens"] == 1
    assert one["longer_than_priced"] > soft["longer_than_priced"]


@pytest.mark.parametrize("more", ["--keep 0.5", "--milliseconds 3 --latency-model x"])
def test_a_hard_budget_of_another_kind_is_refused(monkeypatch, place, tmp_path, capsys, more):
    with pytest.raises(SystemExit):
        records(monkeypatch, place, tmp_path, "even", "--hard-budgets", *more.split())
    assert "--hard-budgets has no effect with --keep or --milliseconds; leave it out" in capsys.readouterr().err


@pytest.mark.slow
def test_a_training_keeps_its_price_and_older_ones_go_on_at_one_token(monkeypatch, place, tmp_path, capsys):
    options = "--total-queries 8 --test-budgets 0.9 --budgets 0.8 1 --batch-size 8 --test-queries 4"
    where = ["--backbone", place / "vlm", "--data", LONG, "--validate-queries", 4, "--max-new-tokens", 6]
    run, older = tmp_path / "run", tmp_path / "older"
    command(monkeypatch, train_gumbel.main, *options.split(), *where, "--out", run)
    assert len(re.findall(r"plans are priced at \d to 6 tokens an answer", capsys.readouterr().err)) == 1
    assert yaml.safe_load((run / "config.yaml").read_text())["answer_tokens"] is None
    kept = json.loads((run / "controller.json").read_text())["expected_answer_tokens"]
    assert max(numbers_of(kept)) == 6 and expectation_of([str(run)]) == kept
    assert {record["expected_tokens"] > 2 for record in json.loads((run / "result.json").read_text())} == {True}
    command(monkeypatch, train_gumbel.main, *options.split(), *where, "--out", older, "--answer-tokens", 1)
    config = yaml.safe_load((older / "config.yaml").read_text())
    assert config.pop("answer_tokens") == 1
    (older / "config.yaml").write_text(yaml.safe_dump(config))
    (older / "result.json").unlink()
    capsys.readouterr()
    command(monkeypatch, train_gumbel.main, "--out", older, "--resume")
    assert "plans are priced" not in capsys.readouterr().err
    assert expectation_of([str(older)]) == 1


def test_a_vlm_of_ones_own_keeps_hard_budgets(runs, asked):
    """And soft ones not; pieces of an answer add up to the same."""
    vlm = AdaptiveVLM.from_pretrained(runs / "tree")
    shown = [asked[number] for number in range(8)]
    batch = [query.image for query in shown], [query.question for query in shown]
    budget, most = 0.9, 20
    soft, hard = (vlm.generate(*batch, budget, max_new_tokens=most, hard=rule) for rule in (False, True))
    limits = [budget * int(vlm.backbone.full_llm_flops(vlm.backbone.encode([query]))) for query in shown]
    assert any(reply.spent_llm_flops > limit for reply, limit in zip(soft, limits, strict=True))
    assert all(reply.spent_llm_flops <= limit for reply, limit in zip(hard, limits, strict=True))
    assert any(reply.cut for reply in hard) and not any(reply.cut for reply in soft)
    assert [reply.llm_flops for reply in hard] == [reply.llm_flops for reply in soft]
    cut = next(row for row, reply in enumerate(hard) if reply.cut)
    stream = vlm.generate(*(column[cut] for column in batch), budget, max_new_tokens=most, stream=True, hard=True)
    assert "".join(stream) == hard[cut].text and stream.reply.figures() == hard[cut].figures()
    with pytest.raises(InputError, match="hard=True is for budgets in FLOPs"):
        vlm.generate(*batch, latency_ms=3.0, hard=True)


def test_an_experiment_hands_its_price_on_and_older_ones_keep_theirs(tmp_path):
    """Heads of versions that priced all plans at one token name no price."""
    (tmp_path / "new").mkdir()
    experiment = Experiment("training", out=tmp_path / "new", answer_tokens="mean")
    options = experiment._training_options()
    assert options[options.index("--answer-tokens") + 1] == "mean"
    head = experiment._check()
    assert head["answer_tokens"] == "mean"
    assert "--answer-tokens" not in Experiment("training", out=tmp_path / "new")._training_options()
    head.pop("answer_tokens")
    (tmp_path / "new" / "experiment.json").write_text(json.dumps(head))
    older = Experiment("training", out=tmp_path / "new")
    older._check()
    options = older._training_options()
    assert options[options.index("--answer-tokens") + 1] == "1"
    with pytest.raises(InputError, match="was begun with answer_tokens 1, now 'mean'"):
        experiment._check()
