"""The experiment command: trains what is missing, tells what it found, and survives what goes wrong."""

import html
import json
import re
import shutil
import subprocess

import numpy as np
import pytest

import eval.__main__ as eval_main
from backbones import EncodingBank, load_backbone
from envs import load_queries
from eval.evaluate import evaluate
from eval.experiment import arms, command
from eval.experiment.arms import Arm, Prepared, relaxed
from eval.experiment.cells import Cell, fill, lay_out
from eval.experiment.claims import claims
from eval.experiment.statistics import area_under_curve, compare, hypervolume, interquartile_mean, mean_over_seeds
from eval.experiment.summary import ArmResult, by_kind
from eval.plan_pictures import darkened
from eval.policies import load_planner
from tests.browser import CHROMIUM, QUIET
from tests.conftest import command as run_command
from tests.conftest import make_dataset

RL = "--envs 8 --rollout-steps 2 --batch-size 8"
ARMS = [
    arms.FULL,
    Arm("random", "random"),
    relaxed("gumbel", "gumbel", "--batch-size", "8"),
    Arm("rl", script="train_rl", options=(*RL.split(), "--init-from", "{gumbel}")),
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


def test_everything_that_is_promised_is_there(done):
    assert {path.name for path in done.iterdir()} == {"experiment.json", "static.json", "cells", "training"}
    names = {path.name for path in (done / "training").iterdir()}
    files = "tables.md accuracy.csv interquartile.csv paired.csv cost.csv convergence.csv report.html"
    pictures = "accuracy-llm-flops accuracy-total-flops budgets learning"
    assert set(files.split()) | {f"{name}.{kind}" for name in pictures.split() for kind in ("png", "svg")} <= names
    assert "kept-0.png" in names
    text = (done / "training" / "tables.md").read_text()
    assert re.search(r"At 60 % of the LLM FLOPs rl keeps \d+\.\d %, gumbel keeps \d+\.\d % of full accuracy\.", text)
    assert "### Paired comparisons" in text
    assert "Without figures: random at 0.1:" in text, "a budget that cannot be met is a gap with its reason"
    page = (done / "training" / "report.html").read_text()
    assert page.count("data:image/png;base64,") >= 5 and "http" not in page.replace("http-equiv", "")
    assert "train_gumbel" in page and 'name="viewport"' in page


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


def test_what_is_there_is_not_done_again_and_what_failed_is(monkeypatch, done, place, tmp_path):
    out = tmp_path / "said"
    shutil.copytree(done, out)
    before = {path: path.stat().st_mtime_ns for path in out.glob("cells/*/*/records.json")}
    broken = out / "cells" / "gumbel" / "seed-1"
    shutil.rmtree(broken)
    broken.mkdir()
    (broken / "run").write_text("in the way")
    experiment(monkeypatch, place, out)
    assert "gumbel, seed 1" in (out / "training" / "report.html").read_text()
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
    assert (quick.seeds, quick.total_queries, quick.test_queries, quick.tuning_queries) == ((0,), 6000, 500, 100)


def test_a_name_means_the_same_in_every_experiment():
    """Or experiments in one folder would take each other's cells for their own."""
    by_name = {}
    for make in arms.EXPERIMENTS.values():
        for arm in make(Prepared({}, command.Path("x/static.json"))):
            assert by_name.setdefault(arm.name, arm) == arm


def test_another_experiment_in_the_folder_trains_only_what_is_new(monkeypatch, done, place, tmp_path):
    out = tmp_path / "said"
    shutil.copytree(done, out)
    before = {path: path.stat().st_mtime_ns for path in out.glob("cells/*/*/records.json")}
    monkeypatch.setitem(arms.EXPERIMENTS, "dimensions", lambda prepared: [*ARMS[:4], Arm("stride", "stride")])
    experiment(monkeypatch, place, out, "--arms", "rl", name="dimensions")
    assert {path: path.stat().st_mtime_ns for path in out.glob("cells/*/*/records.json")} == before
    assert "stride, seeds 0, 1</b>: not measured yet" in (out / "dimensions" / "report.html").read_text()
    experiment(monkeypatch, place, out, name="dimensions")
    after = {path: path.stat().st_mtime_ns for path in out.glob("cells/*/*/records.json")}
    assert {path.parent.parent.name for path in after.keys() - before.keys()} == {"stride"}
    assert all(after[path] == when for path, when in before.items())
    assert (out / "dimensions" / "report.html").exists() and (out / "training" / "report.html").exists()


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


def test_paired_tests_find_a_difference_and_none_where_there_is_none():
    """Null: the same numbers, and two draws of one distribution."""
    rng = np.random.default_rng(0)
    base = rng.random(4000) < 0.8
    better = base | (rng.random(4000) < 0.1)
    other = rng.random(4000) < 0.8
    found = compare([("a", "b", 0.5, better * 1.0, base * 1.0), ("c", "c", 0.5, base * 1.0, base * 1.0)])
    assert [each.verdict for each in found] == ["above", "no difference shown"]
    turned = found[0].mirrored
    assert (turned.first, turned.second, turned.verdict) == ("b", "a", "below")
    assert turned.difference.low < turned.difference.value == -found[0].difference.value < turned.difference.high
    assert found[0].difference.low < float(better.mean() - base.mean()) < found[0].difference.high
    assert compare([("b", "a", 0.5, base * 1.0, better * 1.0)])[0].verdict == "below"
    assert compare([("o", "b", None, other * 1.0, base * 1.0)])[0].verdict == "no difference shown"
    assert compare([]) == []
    alone = compare([("a", "b", 0.5, better * 1.0, base * 1.0)])[0].p
    assert found[0].p == pytest.approx(min(1.0, 2 * alone)), "Holm: the smallest of two is doubled"


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
    assert hypervolume([(0.5, 0.8), (0.25, 0.6), (0.9, 0.7)]) == pytest.approx(0.25 * 0.6 + 0.5 * 0.8)
    kinds = by_kind(np.array([[1.0, 0.0, 1.0, 1.0]]), ["a", "a", "b", "b"])
    assert kinds.tolist() == [[0.5, 1.0]] and by_kind(np.ones((2, 3)), None).shape == (2, 1)


def test_a_falling_curve_is_said():
    result = ArmResult("x")
    for budget, accuracy in ((0.25, 0.8), (0.5, 0.7), (1.0, 0.9)):
        result.records[budget] = [{"accuracy": accuracy, "accuracy_stderr": 0.01, "budgeted": True}]
    said = claims("training", {"x": result}, [], (0.25, 0.5, 1.0))
    assert said == ["x: accuracy falls by more than a standard error from budget 0.25 to 0.5."]


def test_dropped_patches_are_dark():
    pixels = np.full((8, 8, 3), 200, np.uint8)
    shown = darkened(pixels, np.array([True, False, False, False]))
    assert (shown[:4, :4] == 200).all() and (shown[4:] == 50).all()
    strip = darkened(pixels, np.array([True, False, True]))
    assert strip.shape == (10, 8, 3) and strip[9, 0, 0] == 255 and strip[9, 4, 0] == 40


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


def test_cells_can_be_done_side_by_side(done, monkeypatch, place, tmp_path):
    experiment(monkeypatch, place, tmp_path / "out", "--jobs", "2", "--seeds", "0")
    one, other = (lay_out(folder, ARMS, (0,)) for folder in (done, tmp_path / "out"))
    for mine, theirs in zip(one, other, strict=True):
        assert theirs.failure() is None
        for name, column in mine.outcomes().items():
            # threads may change a last bit, and with it an answer
            assert np.mean(column != theirs.outcomes()[name]) < 0.2, (mine.arm.name, name)


def test_timing_wants_the_machine_for_itself(monkeypatch, place, tmp_path, capsys):
    with pytest.raises(SystemExit):
        experiment(monkeypatch, place, tmp_path / "out", "--jobs", "2", "--timing", "3")
    assert "--timing needs the machine for itself: leave out --jobs 2" in capsys.readouterr().err
