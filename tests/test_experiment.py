"""The experiment command: trains what is missing, tells what it found, and survives what goes wrong."""

import html
import json
import re
import shutil
import subprocess
from functools import partial

import numpy as np
import pytest
import wandb
from scipy.stats import ttest_rel

import maskgym.eval.__main__ as eval_main
from maskgym.backbones import EncodingBank, InputError, load_backbone
from maskgym.envs import load_queries
from maskgym.eval.experiment import arms, command, pictures
from maskgym.eval.experiment import cells as cells_module
from maskgym.eval.experiment.arms import Arm, Prepared, relaxed
from maskgym.eval.experiment.cells import Cell, attempt, fill, lay_out
from maskgym.eval.experiment.claims import ASKED, answers, pairs, remarks
from maskgym.eval.experiment.report import Report
from maskgym.eval.experiment.statistics import (
    Estimate,
    Pair,
    area_under_curve,
    area_weights,
    compare,
    difference,
    hypervolume,
    interquartile_mean,
    mean_over_seeds,
    show_p,
    standard_error,
)
from maskgym.eval.experiment.summary import ArmResult, by_kind, collect, comparisons, estimates, gaps, images_of, ranked
from maskgym.eval.experiment.tables import accuracy_table, comparison_table, cost_table
from maskgym.eval.measure.evaluate import evaluate
from maskgym.eval.measure.plan_pictures import darkened
from maskgym.eval.measure.timing import add_timing
from maskgym.eval.policies import load_planner
from tests.browser import CHROMIUM, QUIET
from tests.conftest import command as run_command
from tests.conftest import make_dataset

RL = "--envs 8 --rollout-steps 2 --batch-size 8"
ARMS = [
    arms.FULL,
    Arm("random", "random"),
    relaxed("gumbel", "gumbel", "--batch-size", "8"),
    Arm("rl", script="train-rl", options=(*RL.split(), "--init-from", "{gumbel}")),
    Arm("stride, half", "stride@0.5", seeded=False),
]


def experiment(monkeypatch, place, out, *more, name="training"):
    monkeypatch.setitem(arms.EXPERIMENTS, "training", lambda prepared: ARMS)
    where = ["--backbone", place / "vlm", "--data", place / "said", "--out", out]
    options = "--budgets 0.1 0.6 1 --total-queries 64 --seeds 0 1"
    run_command(monkeypatch, eval_main.main, "experiment", name, *where, *options.split(), *more)


@pytest.fixture(scope="module")
def place(place):
    """With data whose answers the full model says, three times of four."""
    backbone = load_backbone(str(place / "vlm"))
    made = make_dataset(12)
    queries = load_queries(str(place / "data"), "test")
    encoding = EncodingBank(backbone, queries).gather(range(12))
    said = backbone.answer(encoding, backbone.full(encoding)).texts
    answers = [[text if number % 4 else "never"] for number, text in enumerate(said)]
    made.remove_columns("answers").add_column("answers", answers).save_to_disk(place / "said")
    return place


@pytest.fixture(scope="module")
def done(place, tmp_path_factory):
    """A finished experiment of two seeds, whose trainings ran as processes of their own."""
    out = tmp_path_factory.mktemp("experiment") / "said"
    with pytest.MonkeyPatch.context() as patch:
        experiment(patch, place, out)
    return out


@pytest.mark.slow
def test_everything_that_is_promised_is_there(done):
    assert {path.name for path in done.iterdir()} == {"experiment.json", "static.json", "cells", "training"}
    names = {path.name for path in (done / "training").iterdir()}
    files = "tables.md accuracy.csv interquartile.csv paired.csv cost.csv convergence.csv report.html"
    pictures = "accuracy-llm-flops accuracy-total-flops budgets learning"
    assert set(files.split()) | {f"{name}.{kind}" for name in pictures.split() for kind in ("png", "svg")} <= names
    assert "kept-0.png" in names
    text = (done / "training" / "tables.md").read_text()
    assert re.search(r"At 60 % of the LLM FLOPs gumbel keeps \d+\.\d % of full accuracy, rl \d+\.\d %\.", text)
    assert re.search(r"Queries until .* within 1 point of its end: gumbel after \d+, rl after \d+\.", text)
    assert re.search(r"\*\*Is PPO better than Gumbel straight-through\?\*\* (Confirmed|Refuted|Not decided)", text)
    assert "### Paired comparisons" in text
    gap = (
        r"- Without figures, the budget is below .*: at 0\.1, random \(possible from [\d.]+\), gumbel, rl \(poss.*\)\."
    )
    assert re.search(gap, text), "a budget that cannot be met is a gap with its reason"
    page = (done / "training" / "report.html").read_text()
    assert page.count("data:image/png;base64,") >= 5 and "http" not in page.replace("http-equiv", "")
    assert "maskgym train-gumbel" in page and 'name="viewport"' in page
    seconds = [
        json.loads(file.read_text().splitlines()[-1])["seconds"] for file in done.glob("cells/*/*/run/timing.jsonl")
    ]
    assert f"<dd>4, in all {sum(seconds) / 3600:.2g} hours of training</dd>" in page and len(seconds) == 4


@pytest.mark.slow
def test_a_cell_can_be_computed_again_from_its_run(done, place):
    """What the committed results promise: the same command gives the same figures."""
    cells = lay_out(done, ARMS, (0, 1))
    (cell,) = (cell for cell in cells if cell.arm.name == "rl" and cell.seed == 1)
    backbone = load_backbone(str(place / "vlm"))
    planner = load_planner(fill(cell.arm.policy, cell, cells), backbone, cell.seed)
    (again,) = evaluate(planner, backbone, EncodingBank(backbone, load_queries(str(place / "said"), "test")), (0.6,), 1)
    (stored,) = (record for record in cell.records() if record["budget"] == 0.6)
    assert {name: stored[name] for name in again if name != "policy"} == {
        n: v for n, v in again.items() if n != "policy"
    }
    assert cell.outcomes()["accuracy@0.6"].mean() == pytest.approx(stored["accuracy"])
    assert (cell.run.parent.parent.name, cell.run.parent.name) == ("rl", "seed-1")
    started_from = (cell.run / "command.txt").read_text()
    assert "cells/gumbel/seed-1/run" in started_from


@pytest.mark.slow
def test_what_is_there_is_not_done_again_and_what_failed_is(monkeypatch, done, place, tmp_path):
    out = tmp_path / "said"
    shutil.copytree(done, out)
    before = {path: path.stat().st_mtime_ns for path in out.glob("cells/*/*/records.json")}
    broken = out / "cells" / "gumbel" / "seed-1"
    shutil.rmtree(broken)
    broken.mkdir()
    (broken / "run").write_text("in the way")
    experiment(monkeypatch, place, out)
    assert "gumbel (seed 1)" in (out / "training" / "report.html").read_text()
    assert "is a file; choose another --out" in (broken / "failure.txt").read_text()
    (broken / "run").unlink()
    experiment(monkeypatch, place, out)
    assert not (broken / "failure.txt").exists() and (broken / "records.json").exists()
    kept = {path: path.stat().st_mtime_ns for path in before if broken not in path.parents}
    assert kept == {path: when for path, when in before.items() if broken not in path.parents}
    first, second = ((folder / "cells/gumbel/seed-1/records.json").read_text() for folder in (done, out))
    assert json.loads(first) == json.loads(second)


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--seeds", "0", "1", "0"], "--seeds 0 1 0: give one or more, each once"),
        (["--budgets", "0.5"], "--budgets: give two or more, each once"),
        (["--budgets", "0.5", "2"], "budget 2 is outside (0, 1]"),
        (["--arms", "gumble"], "--arms has 'gumble'; training has 'full', 'random', 'gumbel', 'rl', 'stride, half'"),
        (["--total-queries", "0"], "--total-queries is 0; it must be at least 1"),
        (["--total-queries", "65"], "was begun with total_queries 64, now 65; go on with the same"),
    ],
)
@pytest.mark.slow
def test_bad_options_are_named(monkeypatch, done, place, capsys, more, words):
    with pytest.raises(SystemExit):
        experiment(monkeypatch, place, done, *more)
    assert words in capsys.readouterr().err


def test_folders_of_something_else_are_refused(monkeypatch, place, tmp_path, capsys):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(SystemExit):
        experiment(monkeypatch, place, tmp_path)
    assert "holds something that is no experiment" in capsys.readouterr().err
    (tmp_path / "experiment.json").write_text("{")
    with pytest.raises(SystemExit):
        experiment(monkeypatch, place, tmp_path)
    assert "cannot be read" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        experiment(monkeypatch, place, tmp_path / "notes.txt")
    assert "is a file; name a folder" in capsys.readouterr().err


def test_quick_is_smaller():
    quick = command.Experiment("training", None, quick=True)
    assert (quick.seeds, quick.total_queries, quick.test_queries, quick.tuning_queries) == ((0,), 5000, 500, 100)


def test_a_name_means_the_same_in_every_experiment():
    """Or experiments in one folder would take each other's cells for their own."""
    by_name = {}
    for make in arms.EXPERIMENTS.values():
        for arm in make(Prepared({}, command.Path("x/static.json"))):
            assert by_name.setdefault(arm.name, arm) == arm


@pytest.mark.slow
def test_another_experiment_in_the_folder_trains_only_what_is_new(monkeypatch, done, place, tmp_path):
    out = tmp_path / "said"
    shutil.copytree(done, out)
    before = {path: path.stat().st_mtime_ns for path in out.glob("cells/*/*/records.json")}
    monkeypatch.setitem(arms.EXPERIMENTS, "dimensions", lambda prepared: [*ARMS[:4], Arm("stride", "stride")])
    experiment(monkeypatch, place, out, "--arms", "rl", name="dimensions")
    assert {path: path.stat().st_mtime_ns for path in out.glob("cells/*/*/records.json")} == before
    assert "<b>not measured yet</b>: stride" in (out / "dimensions" / "report.html").read_text()
    experiment(monkeypatch, place, out, name="dimensions")
    after = {path: path.stat().st_mtime_ns for path in out.glob("cells/*/*/records.json")}
    assert {path.parent.parent.name for path in after.keys() - before.keys()} == {"stride"}
    assert all(after[path] == when for path, when in before.items())
    assert (out / "dimensions" / "report.html").exists() and (out / "training" / "report.html").exists()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.slow
def test_the_report_is_a_run_of_the_trainings_group(monkeypatch, done, place, tmp_path):
    monkeypatch.setenv("WANDB_MODE", "offline")
    begun, init = [], wandb.init
    monkeypatch.setattr("wandb.init", lambda **options: begun.append(options) or init(**options))
    out = tmp_path / "said"
    shutil.copytree(done, out)
    backbone, queries = load_backbone(str(place / "vlm")), load_queries(str(place / "said"), "test")
    report = Report("training", out / "training", lay_out(out, ARMS, (0, 1)), (0, 1), (0.1, 0.6, 1), backbone, queries)
    report.drawn = [out / "training" / "budgets.png"]
    report.track("maskgym-test", "said")
    assert [(each["project"], each["group"]) for each in begun] == [("maskgym-test", "said")]
    (media,) = out.glob("training/wandb/offline-run-*/files/media")
    names = {file.name.partition("_")[0] for file in media.glob("*/*") if file.is_file()}
    assert {"answers", "accuracy", "paired", "cost", "convergence", "report", "budgets"} <= names


@pytest.mark.parametrize("name", list(arms.EXPERIMENTS))
def test_arms_have_names_of_their_own_and_what_they_need(name):
    made = arms.EXPERIMENTS[name](Prepared({}, command.Path("x/static.json")))
    names = [arm.name for arm in made]
    assert len(set(names)) == len(names) and names[0] == "full"
    cells = lay_out(command.Path("x"), made, (3, 4))
    for place, cell in enumerate(cells):
        assert all(needed in [c.arm.name for c in cells[:place]] for needed in cell.arm.needs(made))
        assert "{" not in fill(cell.arm.policy, cell, cells)
        assert not any("{" in fill(option, cell, cells) for option in cell.arm.options)
    assert [cell.seed for cell in cells if cell.arm.name == "full"] == [3]


def pair_of(first, second, budget, first_Q, second_Q, **more):
    """Of arms with one seed."""
    return Pair(first, second, budget, np.asarray(first_Q)[None] * 1.0, np.asarray(second_Q)[None] * 1.0, **more)


@pytest.mark.slow
def test_tests_find_a_difference_and_none_where_there_is_none():
    """Null: the same numbers, and two draws of one distribution."""
    rng = np.random.default_rng(0)
    base = rng.random(4000) < 0.8
    better = base | (rng.random(4000) < 0.1)
    other = rng.random(4000) < 0.8
    above, none = pair_of("a", "b", 0.5, better, base), pair_of("c", "c", 0.5, base, base)
    found = compare([above, none])
    assert [each.verdict for each in found] == ["above", "no difference shown"]
    assert found[0].difference.low < float(better.mean() - base.mean()) < found[0].difference.high
    assert compare([pair_of("b", "a", 0.5, base, better)])[0].verdict == "below"
    assert compare([pair_of("o", "b", None, other, base)])[0].verdict == "no difference shown"
    assert compare([]) == []
    alone = compare([above])[0].p
    assert found[0].p == pytest.approx(min(1.0, 2 * alone)), "Holm: the smallest of two is doubled"
    both = compare([above, none, pair_of("a", "b", None, better, base)])
    assert [each.budget for each in both] == [None, 0.5, 0.5]
    assert (both[0].p, both[1].p) == (alone, found[0].p), "areas and single budgets are two families"


def test_with_one_seed_each_it_is_the_paired_t_test():
    first, second = np.random.default_rng(0).random((2, 1, 500))
    estimate, p = difference(first, second)
    test = ttest_rel(first[0], second[0])
    assert p == pytest.approx(test.pvalue)
    assert (estimate.low, estimate.high) == pytest.approx(tuple(test.confidence_interval()))
    assert difference(np.ones((2, 9)), np.zeros((1, 9))) == (Estimate(1, 1, 1), 0), "nothing varies"


@pytest.mark.parametrize(("images", "seeds"), [(1, 3), (4, 3), (4, 1)])
def test_chance_between_trainings_and_images_is_not_taken_for_a_difference(images, seeds):
    """Two arms of one distribution, whose trainings differ, and whose queries of an image are answered alike: where no
    difference is, one is found in a twentieth of the cases; a test over queries alone would find it in far more."""
    rng, number, of_queries = np.random.default_rng(images + seeds), 100, []
    images_Q = np.repeat(np.arange(number), images)
    found = []
    for _ in range(200):
        training = rng.normal(0, 0.1 if seeds > 1 else 0, (2, seeds, 1))
        by_image = rng.normal(0, 0.5, (2, 1, number)).repeat(images, axis=2)
        scores = training + by_image + rng.normal(0, 0.5, (2, seeds, len(images_Q)))
        found.append(difference(*scores, images_Q)[1] < 0.05)
        of_queries.append(ttest_rel(*scores.mean(1)).pvalue < 0.05)
    assert 0.01 <= np.mean(found) <= 0.09 and np.mean(of_queries) > 0.12


def test_p_values_and_standard_errors_are_shown():
    assert [show_p(p) for p in (0.0, 9.9e-5, 1e-4, 0.0462, 1.0)] == ["< 0.0001", "< 0.0001", "0.0001", "0.046", "1"]
    scores = np.random.default_rng(0).random((3, 400))
    assert standard_error(scores) == pytest.approx(scores.mean(0).std(ddof=1) / 20)
    assert standard_error(scores[:, :1]) == 0


def test_intervals_over_seeds_hold_the_mean():
    scores = np.clip(0.8 + 0.05 * np.random.default_rng(0).standard_normal((5, 6)), 0, 1)
    mean, middle = mean_over_seeds(scores), interquartile_mean(scores)
    assert mean.low < mean.value < mean.high and mean.value == pytest.approx(scores.mean())
    assert middle.low < middle.value < middle.high
    assert middle.value == pytest.approx(np.sort(scores.flatten())[7:-7].mean())
    alone = mean_over_seeds(scores[:1])
    assert alone.low == alone.high, "one seed has no interval"


def test_areas():
    assert area_under_curve((0.2, 0.6, 1.0), (0.5, 0.7, 0.9)) == pytest.approx(0.7)
    assert area_weights((0.2, 0.3, 1.0)).tolist() == pytest.approx([0.0625, 0.5, 0.4375]), "linear in the budget"
    assert hypervolume([(0.5, 0.8), (0.25, 0.6), (0.9, 0.7)]) == pytest.approx(0.25 * 0.6 + 0.5 * 0.8)
    kinds = by_kind(np.array([[1.0, 0.0, 1.0, 1.0]]), ["a", "a", "b", "b"])
    assert kinds.tolist() == [[0.5, 1.0]] and by_kind(np.ones((2, 3)), None).shape == (2, 1)


def test_a_falling_curve_is_said():
    result = ArmResult("x")
    for budget, accuracy in ((0.25, 0.8), (0.5, 0.7), (1.0, 0.9)):
        figures = {"accuracy": accuracy, "accuracy_stderr": 0.01, "llm_flops_ratio": budget}
        result.records[budget] = [{**figures, "budgeted": True}]
    said = remarks("training", {"x": result}, (0.25, 0.5, 1.0))
    assert said == ["x: accuracy falls by more than a standard error from budget 0.25 to 0.5."]


BUDGETS = (0.2, 0.5, 1.0)
QUERIES = 1000


def made(tmp_path, curves, seeds=3, unbudgeted=()):
    """Results of arms that answer given shares of queries right; a later arm's right ones hold those of a worse one."""
    order = np.random.default_rng(0).permutation(QUERIES)
    results = {}
    for name, curve in curves.items():
        result = results[name] = ArmResult(name)
        script = "train-rl" if pictures.is_ours(name) else None
        for seed in range(seeds):
            result.cells.append(Cell(Arm(name, script=script), seed, tmp_path / name / str(seed)))
            result.outcomes.append({})
        for budget, share in zip(BUDGETS, curve, strict=True):
            if share is None:
                result.gaps[budget] = (
                    f"budget {budget:g} is below what policy {name!r} can meet; the least budget here is 0.4"
                )
                continue
            for seed in range(seeds):
                right = (order < round(QUERIES * share) - seed).astype(np.float32)
                result.outcomes[seed][f"accuracy@{budget:g}"] = right
                kept = {"kept_tokens": 8.0, "kept_heads": 4.0, "kept_layers": 2.0, "budget_violations": 0}
                spent = {"llm_flops_ratio": 0.9 * budget, "total_flops_ratio": 0.95 * budget}
                scores = {"accuracy": float(right.mean()), "accuracy_stderr": 0.01}
                head = {"budget": budget, "budgeted": name not in unbudgeted}
                result.records.setdefault(budget, []).append({**head, **scores, **spent, **kept})
    return results


def said(experiment, results):
    found = comparisons(results, pairs(experiment), BUDGETS)
    return answers(experiment, results, found, BUDGETS)


def test_an_expectation_is_confirmed_refuted_or_left_open(tmp_path):
    curves = {"rl": (0.8, 0.9, 0.95), "gumbel": (0.7, 0.85, 0.95), "soft-topk": (0.9, 0.93, 0.96)}
    first, second, third = said("training", made(tmp_path, {**curves, "even": (0.799, 0.9, 0.95)}))
    assert (first.verdict, second.verdict) == ("confirmed", "refuted")
    assert first.question == "Is PPO better than Gumbel straight-through?"
    assert re.fullmatch(
        r"Confirmed: over all budgets rl \(area 89\.6 %, 3 seeds\) is above gumbel \(area 85.2 %, 3 seeds\): "
        r"\+4\.3[78] points, 95 % interval \[\+3\.\d+, \+5\.\d+\], p < 0\.0001\.",
        first.sentences[0],
    ), first.sentences[0]
    better = "it is better at 20 and 50 % of the LLM FLOPs and no difference is shown at 100 %"
    assert first.sentences[1] == f"Budget by budget, {better}."
    assert second.sentences[0].startswith("Refuted: over all budgets rl (area 89.6 %, 3 seeds) is below soft-topk (")
    assert "it is worse at 20, 50 and 100 % of the LLM FLOPs." in second.sentences[1]
    assert third.verdict == "not decided by these figures"
    assert "rl (area 89.6 %, 3 seeds) is not shown to differ from even (" in third.sentences[0]
    assert third.sentences[1] == "Budget by budget, no difference is shown at 20, 50 and 100 % of the LLM FLOPs."


@pytest.mark.slow
def test_of_single_trainings_nothing_is_said_of_methods(tmp_path):
    curves = {"rl": (0.8, 0.9, 0.95), "gumbel": (0.7, 0.85, 0.95)}
    results = made(tmp_path, curves, seeds=1)
    (answer,) = said("training", results)
    assert answer.verdict == "not decided by single trainings"
    assert answer.text.startswith("Not decided by single trainings: over all budgets rl (area 89.7 %, 1 seed) is above")
    assert "a single seed" in comparison_table(comparisons(results, [("rl", "gumbel")], BUDGETS)).note
    several = comparison_table(comparisons(made(tmp_path, curves), [("rl", "gumbel")], BUDGETS))
    assert "a single seed" not in several.note


def test_images_are_numbered(source):
    assert images_of(source).tolist() == [number // 2 for number in range(12)]
    assert images_of(source.spread(5)).max() < 5


def test_what_is_really_spent_stands_beside_what_is_asked(tmp_path):
    results = made(tmp_path, {"rl": (0.8, 0.9, 0.95), "rl layers": (0.6, 0.6, 0.9)})
    for record in results["rl layers"].records[0.5]:
        record["llm_flops_ratio"] = 0.2
    rows = {row[0]: row[4:7] for row in accuracy_table(results, estimates(results, None), BUDGETS).rows}
    assert [re.search(r" \((\d+)\)$", cell)[1] for cell in rows["rl layers"]] == ["18", "20", "90"]
    assert not any("(" in cell for cell in rows["rl"])
    spends = "rl layers spends 18, 20 and 90 % of the LLM FLOPs where it may spend 20, 50 and 100 %."
    assert [each for each in remarks("dimensions", results, BUDGETS) if "spends" in each] == [spends]


@pytest.mark.slow
def test_the_best_rival_is_named_and_one_that_meets_few_budgets_is_none(tmp_path):
    curves = {"rl tokens": (0.5, 0.7, 0.9), "stride": (0.3, 0.6, 0.85), "fastv": (0.4, 0.5, 0.8)}
    results = made(tmp_path, {**curves, "divprune": (None, 0.71, 0.91)})
    (answer,) = said("pruning", results)
    assert answer.verdict == "confirmed" and "is above its best rival 'stride' (area" in answer.sentences[0]
    assert "at 20 % the best rival is 'fastv'" in answer.sentences[1]
    assert "at 50 and 100 % the best rival is 'divprune'" in answer.sentences[1]
    del results["stride"], results["fastv"]
    (alone,) = said("pruning", results)
    assert "over the budgets that both can meet, 50 and 100 %, rl tokens (" in alone.sentences[0]
    (few,) = said("pruning", made(tmp_path, {**curves, "stride": (None, None, 0.8), "fastv": (None, None, 0.9)}))
    assert few.sentences[0].startswith("Not decided by these figures: rl tokens shares no two budgets with a rival")
    assert few.sentences[1].endswith(
        "no difference is shown at 100 % of the LLM FLOPs (at 100 % the best rival is 'fastv')."
    )


@pytest.mark.slow
def test_arms_without_figures_are_not_spoken_of_and_none_without_a_budget_is_compared(tmp_path):
    curves = {"full": (None, None, 0.97), "rl": (0.8, 0.9, 0.95), "rl heads": (0.6, 0.8, 0.9)}
    results = made(tmp_path, {**curves, "rl tokens": (None, None, 0.9)}, unbudgeted=("full", "rl tokens"))
    results["rl layers"] = ArmResult("rl layers", failures={0: "not measured yet"})
    (answer,) = said("dimensions", results)
    assert answer.question == "Are all three together better than the best one alone?"
    assert "is above rl heads (area" in answer.sentences[0]
    assert {each.second for each in comparisons(results, pairs("dimensions"), BUDGETS)} == {"rl heads"}
    assert remarks("training", results, BUDGETS) == ["At 50 % of the LLM FLOPs rl keeps 92.7 % of full accuracy."]


@pytest.mark.parametrize("name", list(arms.EXPERIMENTS))
def test_questions_are_few_and_about_arms_that_there_are(name):
    names = {arm.name for arm in arms.EXPERIMENTS[name](Prepared({}, command.Path("x/static.json")))}
    assert 2 <= len(ASKED[name]) <= 6
    assert {arm for pair in pairs(name) for arm in pair} <= names - {"full"}
    assert len(set(pairs(name))) == len(pairs(name)), "a test that is asked twice counts twice in the correction"


def test_gaps_of_one_reason_stand_together(tmp_path):
    curves = {"stride": (None, 0.7, 0.9), "fastv": (None, 0.7, 0.9), "rl": (0.5, 0.7, 0.9), "gumbel": (None, None, 0.9)}
    results = made(tmp_path, curves)
    results["stride"].gaps[0.2] = results["stride"].gaps[0.2].replace("0.4", "0.3")
    results["rl"].failures.update({3: "not measured yet", 4: "not measured yet"})
    results["gumbel"].failures.update({3: "not measured yet", 4: "not measured yet", 5: "RuntimeError: no room"})
    results["later"] = ArmResult("later", failures=dict.fromkeys(range(3), "not measured yet"))
    assert gaps(results) == [
        ("not measured yet", "rl, gumbel (seeds 3, 4); later"),
        ("RuntimeError: no room", "gumbel (seed 5)"),
        (
            "the budget is below what the policy can meet",
            "at 0.2, stride (possible from 0.3), fastv (possible from 0.4); at 0.2 and 0.5, gumbel (possible from 0.4)",
        ),
    ]


def test_tables_are_ranked_and_have_spread_and_errors(tmp_path):
    curves = {
        "random": (0.3, 0.5, 0.9),
        "rl": (0.8, 0.9, 0.95),
        "full": (None, None, 0.97),
        "stride": (None, 0.9, 0.95),
    }
    results = made(tmp_path, curves, unbudgeted=("full",))
    assert [result.name for result in ranked(results, BUDGETS)] == ["full", "rl", "random", "stride"]
    rows = accuracy_table(results, estimates(results, None), BUDGETS).rows
    assert [row[0] for row in rows[1:]] == ["full", "rl", "random", "stride"]
    by_name = dict(zip(rows[0], rows[2], strict=True))
    assert rows[4][:2] == ["stride", "3"] and rows[4][2] == "92.4 from 0.5"
    assert (by_name["area"], by_name["spread"], by_name["spent / asked"]) == ("89.6", "0.10", "0.90")
    (half,) = (row for row in cost_table(results, BUDGETS).rows if row[:2] == ["rl", "0.5"])
    expected = 100 * standard_error(results["rl"].scores(0.5))
    assert half[2:4] == ["89.90", f"{expected:.2f}"] and expected > 0.9
    note = comparison_table(comparisons(results, [("rl", "random"), ("rl", "stride")], BUDGETS)).note
    assert "in two families: the 2 areas, which are the main question, and the 5 single budgets" in note


@pytest.mark.parametrize("others", [1, 17])
@pytest.mark.slow
def test_plots_stand_ours_out_and_list_the_best_first(monkeypatch, tmp_path, others):
    """With few arms and with many; one far worse one does not squash the rest."""
    monkeypatch.setattr(pictures.plt, "close", lambda figure: drawn.append(figure))
    drawn = []
    rivals = {f"rule {number}": (0.70 + number / 100, 0.8, 0.9) for number in range(others)}
    alone = {"full": (None, None, 0.97), "as published": (None, None, 0.9)}
    curves = {**alone, **rivals, "collapsed": (0.1, 0.1, 0.1), "rl": (0.9, 0.93, 0.95)}
    results = made(tmp_path, curves, seeds=2, unbudgeted=tuple(alone))
    for cell in results["rl"].cells:
        write_run(cell.run, [0.6 + 0.1 * cell.seed, 0.8])
        write_run(results["collapsed"].cells[cell.seed].run, [0.1, 0.1])
    path = pictures.draw_tradeoff(results, estimates(results, None), BUDGETS, "llm_flops_ratio", "title", tmp_path)
    pictures.draw_adherence(results, BUDGETS, tmp_path)
    pictures.draw_learning(results, BUDGETS, tmp_path)
    tradeoff, adherence, learning = drawn
    best = ["rl", *(f"rule {number}" for number in reversed(range(others))), "collapsed"]
    assert [text.get_text() for text in tradeoff.legends[0].get_texts()] == ["full (97.0 %)", *best, "as published"]
    assert [text.get_text() for text in adherence.legends[0].get_texts()] == ["all that was asked", *best]
    (axes,) = tradeoff.axes
    box = tradeoff.legends[0].get_window_extent()
    assert box.y1 <= axes.get_window_extent().y0 and box.y0 >= 0, "the legend is outside, and on the picture"
    assert axes.get_ylim()[0] > 40 and any(
        re.match(r"\d+ polic(y goes|ies go) below", text.get_text()) for text in axes.texts
    )
    widths = {line.get_linewidth() for line in axes.lines}
    assert {2.4, 1.2} <= widths
    shares = [line.get_ydata() for line in adherence.axes[0].lines]
    assert list(shares[0]) == [1, 1] and all(list(own) == pytest.approx([0.9] * 3) for own in shares[1:])
    zoomed, whole = (axes.get_ylim()[0] for axes in learning.axes)
    assert 40 < zoomed < 60 and whole < 10, "the upper panel is cut for ours, the lower one shows all"
    (mean,) = (line for line in learning.axes[0].lines if line.get_linewidth() == 2.4)
    assert list(mean.get_ydata()) == pytest.approx([65, 80]) and list(mean.get_xdata()) == [100, 200]
    assert path.is_file() and path.with_suffix(".svg").is_file() and (tmp_path / "learning.png").is_file()


def test_no_two_arms_look_alike():
    names = [arm.name for make in arms.EXPERIMENTS.values() for arm in make(Prepared({}, command.Path("s.json")))]
    for make in arms.EXPERIMENTS.values():
        own = [arm.name for arm in make(Prepared({}, command.Path("s.json")))]
        seen = [json.dumps(look.options, sort_keys=True) for look in pictures.looks(own).values()]
        assert len(set(seen)) == len(own) >= 10
    assert [name for name in dict.fromkeys(names) if pictures.is_ours(name)] == [
        *("rl tokens", "gumbel tokens", "soft-topk tokens", "rl heads", "rl layers"),
        *("rl tokens and heads", "rl tokens and layers", "rl heads and layers"),
        *("rl", "gumbel", "soft-topk", "rl after gumbel"),
    ]


def test_cells_of_other_numbers_of_queries_are_not_averaged(tmp_path):
    """Null: of the same number they are."""
    cells = [Cell(arms.FULL, seed, tmp_path / str(seed)) for seed in (0, 1)]
    for cell, queries in zip(cells, (3, 4), strict=True):
        cell.folder.mkdir()
        np.savez_compressed(cell.folder / "outcomes.npz", **{"accuracy@1": np.ones(queries)})
        (cell.folder / "records.json").write_text("[]")
    with pytest.raises(InputError, match=r"0' has outcomes of 3 queries, .*1' of 4; remove the one"):
        collect(cells)
    assert len(collect(cells[:1])["full"].cells) == 1


def write_run(folder, accuracies):
    """Metrics of a training that was validated every hundred queries."""
    folder.mkdir(parents=True)
    lines = [{"queries": 100 * (n + 1), "validation": {"0.5": {"accuracy": a}}} for n, a in enumerate(accuracies)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    timing = [{"queries": line["queries"], "seconds": line["queries"] / 10, "peak_memory_mb": 100.0} for line in lines]
    (folder / "timing.jsonl").write_text("".join(json.dumps(line) + "\n" for line in timing))


def test_dropped_patches_are_dark():
    pixels = np.full((8, 8, 3), 200, np.uint8)
    shown = darkened(pixels, np.array([True, False, False, False]))
    assert (shown[:4, :4] == 200).all() and (shown[4:] == 50).all()
    strip = darkened(pixels, np.array([True, False, True]))
    assert strip.shape == (10, 8, 3) and strip[9, 0, 0] == 255 and strip[9, 4, 0] == 40


def test_a_failure_of_a_call_beside_is_gone_when_the_cell_is_done(tmp_path):
    cell = Cell(ARMS[1], 0, tmp_path / "cell")
    assert attempt(cell, partial(attempt, cell, partial(int, "taken")))
    assert cell.failure() is None
    assert not attempt(cell, partial(int, "broken")) and "ValueError" in cell.failure()


def test_a_cell_without_files_is_not_done(tmp_path):
    cell = Cell(ARMS[1], 0, tmp_path)
    assert not cell.done and not cell.trained and cell.failure() is None


ON_A_PHONE = """<!doctype html><title>loading</title><iframe id="page" style="width: 390px; height: 800px"></iframe>
<script>
const frame = document.getElementById("page");
frame.onload = () => {
  const page = frame.contentDocument, images = [...page.images];
  document.title = JSON.stringify({
    width: page.documentElement.scrollWidth,
    images: images.length,
    broken: images.filter(image => !image.complete || !image.naturalWidth).length,
    heading: page.querySelector("h1").getBoundingClientRect().height,
    tables: page.querySelectorAll("table").length,
  });
};
frame.srcdoc = PAGE;
</script>"""


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here")
@pytest.mark.slow
def test_the_page_can_be_read_on_a_phone(done, tmp_path):
    """In headless Chromium: nothing is wider than the screen, every picture is shown."""
    page = tmp_path / "phone.html"
    text = (done / "training" / "report.html").read_text()
    page.write_text(ON_A_PHONE.replace("PAGE", json.dumps(text).replace("</", "<\\/")))
    options = [*QUIET, f"--user-data-dir={tmp_path / 'profile'}", "--virtual-time-budget=20000", "--dump-dom"]
    shown = subprocess.run([CHROMIUM, *options, page.as_uri()], capture_output=True, text=True, timeout=120).stdout
    found = json.loads(html.unescape(re.search("<title>(.*?)</title>", shown)[1]))
    assert found["width"] <= 390 and found["images"] >= 5 and found["broken"] == 0
    assert found["heading"] > 0 and found["tables"] >= 4


@pytest.mark.slow
def test_cells_can_be_done_side_by_side(done, monkeypatch, place, tmp_path):
    experiment(monkeypatch, place, tmp_path / "out", "--jobs", "2", "--seeds", "0")
    one, other = (lay_out(folder, ARMS, (0,)) for folder in (done, tmp_path / "out"))
    for mine, theirs in zip(one, other, strict=True):
        assert theirs.failure() is None
        for name, column in mine.outcomes().items():
            # threads may change a last bit, and with it an answer
            assert np.mean(column != theirs.outcomes()[name]) < 0.2, (mine.arm.name, name)


@pytest.mark.slow
def test_times_are_added_to_what_is_done(monkeypatch, done, place, tmp_path):
    """Of the first seed; all else stays as it was. Where times cannot be had, figures stay, and the reason is said."""
    out = tmp_path / "said"
    shutil.copytree(done, out)

    def without_a_clock(planner, *rest):
        if planner.name == "random":
            raise RuntimeError("no clock")
        add_timing(planner, *rest)

    monkeypatch.setattr(cells_module, "add_timing", without_a_clock)
    experiment(monkeypatch, place, out, "--timing", "1")
    for cell in lay_out(out, ARMS, (0, 1)):
        before, after = (
            json.loads((folder / "records.json").read_text()) for folder in (twin(cell, done), cell.folder)
        )
        timed = cell.seed == 0 and cell.arm.name != "random"
        for old, new in zip(before, after, strict=True):
            assert old == {name: new[name] for name in old}
            assert ("ttft_ms_p50" in new) == (timed and "gap" not in new) and new.get("ttft_ms_p50", 1) > 0
        assert cell.timed == timed
    said = (out / "training" / "tables.md").read_text()
    assert "| TTFT ms |" in said and re.search(
        r"Without figures, of time only \(RuntimeError: no clock\): random \(seed 0\)\.", said
    )
    assert (out / "training" / "accuracy-first-token.svg").is_file()
    assert not (done / "training" / "accuracy-first-token.svg").exists(), "without times there is no such plot"


def twin(cell, out):
    """The folder of the same cell in another experiment."""
    return out / cell.folder.relative_to(cell.folder.parents[2])


def test_timing_wants_the_machine_for_itself(monkeypatch, place, tmp_path, capsys):
    with pytest.raises(SystemExit):
        experiment(monkeypatch, place, tmp_path / "out", "--jobs", "2", "--timing", "3")
    assert "--timing needs the machine for itself: leave out --jobs 2" in capsys.readouterr().err
