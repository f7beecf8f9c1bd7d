"""The command: from options to a run folder, resumed exactly, and clear about bad input."""

import json
from shutil import copytree

import pytest
from safetensors.torch import load_file

import maskgym.eval.__main__ as eval_main
import maskgym.training.rl as train_rl
from maskgym.common.run_folder import RunFolder
from maskgym.training.clock import throughput
from tests.conftest import command
from tests.refusals import snapshot

OPTIONS = (
    "--budgets 0.6 1.0 --test-budgets 0.6 1.0 --envs 8 --rollout-steps 2 --batch-size 8 --total-queries 24 "
    "--checkpoint-every 8 --validate-every 8"
)


def train(monkeypatch, place, out, *more):
    where = ["--backbone", place / "vlm", "--data", place / "data", "--out", out]
    command(monkeypatch, train_rl.main, *where, *OPTIONS.split(), *more)


def lines(out):
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.slow
def test_a_run_leaves_everything_that_is_promised(monkeypatch, place, tmp_path, capsys):
    train(monkeypatch, place, tmp_path / "run")
    files = (
        "config.yaml command.txt environment.json metrics.jsonl timing.jsonl result.json controller.safetensors "
        "controller.json checkpoints tradeoff.png training.png"
    )
    assert set(files.split()) == {path.name for path in (tmp_path / "run").iterdir()}
    records = json.loads((tmp_path / "run" / "result.json").read_text())
    assert [(record["policy"], record["budget"]) for record in records] == [
        ("full", 1.0),
        ("random", 0.6),
        ("even", 0.6),
        ("rl", 0.6),
        ("rl", 1.0),
    ]
    assert all(record["budget_violations"] == 0 for record in records)
    printed = capsys.readouterr().out
    assert "| rl " in printed and str(tmp_path / "run") in printed
    assert [line["queries"] for line in lines(tmp_path / "run") if "validation" in line] == [8, 16, 24]
    assert sum("reward" in line for line in lines(tmp_path / "run")) == 6
    timing = [json.loads(line) for line in (tmp_path / "run" / "timing.jsonl").read_text().splitlines()]
    assert 0 < timing[0]["update_seconds"] < timing[-1]["update_seconds"] < timing[-1]["seconds"]
    assert "% of the time in updates" in throughput(timing)
    json_file = tmp_path / "again.json"
    options = ["--budgets", "0.6", "--json", json_file, "--plot", tmp_path / "again.png"]
    command(monkeypatch, eval_main.main, "run", tmp_path / "run", "random", "--data", place / "data", *options)
    again = json.loads(json_file.read_text())
    assert again[0] == {**records[3], "policy": "run"}
    assert (tmp_path / "again.png").exists()


class Killed(BaseException):
    pass


@pytest.mark.slow
def test_without_projection_plans_overspend_in_training_and_not_in_use(monkeypatch, place, tmp_path):
    """Null: with projection none does."""
    for name, more in (("free", ["--no-fit"]), ("fitted", [])):
        train(monkeypatch, place, tmp_path / name, "--rule", "threshold", *more)
        over = [line["flops"] > line["budget"] for line in lines(tmp_path / name) if "flops" in line]
        assert any(over) == (name == "free")
        records = json.loads((tmp_path / name / "result.json").read_text())
        assert all(record["budget_violations"] == 0 for record in records)


@pytest.mark.slow
def test_a_reward_may_ask_for_predicted_time(monkeypatch, place, tmp_path, capsys):
    where = ["--backbone", place / "vlm", "--data", place / "data"]
    model = tmp_path / "latency.json"
    command(monkeypatch, eval_main.main, "latency", "full", *where, "--queries", 2, "--repeats", 1, "--out", model)
    train(monkeypatch, place, tmp_path / "run", "--reward", "accuracy", "-0.5*latency", "--latency-model", model)
    assert all("reward" in line or "validation" in line for line in lines(tmp_path / "run"))
    with pytest.raises(SystemExit):
        train(monkeypatch, place, tmp_path / "without", "--reward", "latency")
    assert "--reward latency needs --latency-model FILE" in capsys.readouterr().err


OTHER = ("--algo", "a2c", "--no-fit", "--reward", "lagrangian", "0.1*log-likelihood")


@pytest.mark.parametrize(
    ("at", "begun", "more"), [(8, 12, ()), (40, 24, ()), (56, 24, ()), (96, 24, ()), (56, 24, OTHER)]
)
@pytest.mark.slow
def test_killed_and_resumed_is_never_killed(monkeypatch, place, tmp_path, at, begun, more):
    """Also where fewer queries were asked for, until it was killed before the first update."""
    train(monkeypatch, place, tmp_path / "whole", *more)
    step = train_rl.RunCallback._on_step

    def dying(self):
        if self.num_timesteps == at:
            raise Killed
        return step(self)

    with monkeypatch.context() as patch:
        patch.setattr(train_rl.RunCallback, "_on_step", dying)
        with pytest.raises(Killed):
            train(monkeypatch, place, tmp_path / "killed", "--total-queries", begun, *more)
    assert not (tmp_path / "killed" / "result.json").exists()
    longer = ["--total-queries", 24] if begun < 24 else []
    command(monkeypatch, train_rl.main, "--out", tmp_path / "killed", "--resume", *longer)
    whole, resumed = (load_file(tmp_path / name / "controller.safetensors") for name in ("whole", "killed"))
    assert all((whole[name] == resumed[name]).all() for name in whole)
    assert lines(tmp_path / "whole") == lines(tmp_path / "killed")
    results = [json.loads((tmp_path / name / "result.json").read_text()) for name in ("whole", "killed")]
    assert results[0] == results[1]


@pytest.mark.slow
def test_other_seeds_give_other_controllers(monkeypatch, place, tmp_path):
    """Null of the test above."""
    for seed in ("0", "1"):
        train(monkeypatch, place, tmp_path / seed, "--seed", seed)
    first, second = (load_file(tmp_path / seed / "controller.safetensors") for seed in ("0", "1"))
    assert any((first[name] != second[name]).any() for name in first)


@pytest.mark.slow
def test_a_finished_run_goes_on_for_longer(monkeypatch, place, tmp_path, capsys):
    """With no line twice and none missing; to the same end if it is killed on the way. As long as it is, it is done."""
    run, twin = tmp_path / "run", tmp_path / "twin"
    train(monkeypatch, place, run, "--total-queries", 8, "--test-queries", 4)
    first, before = lines(run), snapshot(run)
    capsys.readouterr()
    command(monkeypatch, train_rl.main, "--out", run, "--resume")
    assert snapshot(run) == before
    assert "is done, 8 queries; more with --resume and --total-queries" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        command(monkeypatch, train_rl.main, "--out", run, "--resume", "--total-queries", 7)
    assert "--total-queries is 7, but 8 are done in" in capsys.readouterr().err and snapshot(run) == before

    copytree(run, twin)
    command(monkeypatch, train_rl.main, "--out", run, "--resume", "--total-queries", 16)
    assert "16 queries in place of 8, from 8 on; the learning rate goes on as if 16" in capsys.readouterr().out
    assert lines(run)[: len(first)] == first
    kinds = [("validation" in line, line["queries"]) for line in lines(run)]
    assert kinds == [
        (False, 4),
        *((kind, at) for at in (8,) for kind in (False, True)),
        (False, 12),
        (False, 16),
        (True, 16),
    ]
    assert RunFolder(run).config()["total_queries"] == 16
    begun, more = (run / "command.txt").read_text().splitlines()
    assert "--total-queries 8 " in begun and more.endswith("--total-queries 16  # 16 queries in place of 8, from 8 on")

    step = train_rl.RunCallback._on_step
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(train_rl.RunCallback, "_on_step", lambda self: dead() if self.num_timesteps == 56 else step(self))
        command(patch, train_rl.main, "--out", twin, "--resume", "--total-queries", 16)
    assert not (twin / "result.json").exists(), "what it had come to is not what 16 queries come to"
    command(monkeypatch, train_rl.main, "--out", twin, "--resume")
    assert lines(twin) == lines(run)
    for name in ("controller.safetensors", "result.json"):
        assert (twin / name).read_bytes() == (run / name).read_bytes() != before[str(run / name)]


def dead():
    raise Killed


def failing_later(terms):
    failing_later.calls += 1
    if failing_later.calls > 5:
        raise ZeroDivisionError("mid-run")
    return terms.accuracy


@pytest.mark.slow
def test_a_training_that_has_settled_ends_and_goes_on_when_asked_to(monkeypatch, place, tmp_path, capsys):
    """This VLM is never right, so nothing is gained. Null: without patience the training goes on to its end."""
    resumed = ["--out", tmp_path / "run", "--resume"]
    train(monkeypatch, place, tmp_path / "run", "--patience", 1)
    assert lines(tmp_path / "run")[-1]["queries"] == 16
    assert "validation has settled after 16 of 24 queries (--patience 1)" in capsys.readouterr().err
    before = snapshot(tmp_path / "run")
    command(monkeypatch, train_rl.main, *resumed)
    assert "done, 16 queries; more with --resume and --patience 0" in capsys.readouterr().out
    assert snapshot(tmp_path / "run") == before
    command(monkeypatch, train_rl.main, *resumed, "--patience", 0)
    train(monkeypatch, place, tmp_path / "whole", "--patience", 0)
    assert lines(tmp_path / "run") == lines(tmp_path / "whole")
    whole, gone_on = (load_file(tmp_path / name / "controller.safetensors") for name in ("whole", "run"))
    assert all(weights.equal(gone_on[name]) for name, weights in whole.items())


@pytest.mark.slow
def test_a_reward_that_fails_mid_run_ends_it_and_keeps_the_checkpoint(monkeypatch, place, tmp_path, capsys):
    failing_later.calls = 0
    with pytest.raises(SystemExit) as caught:
        train(monkeypatch, place, tmp_path / "run", "--reward", "tests.test_train_rl:failing_later")
    assert caught.value.code == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: reward 'tests.test_train_rl:failing_later' raised ZeroDivisionError: mid-run (quer")
    assert sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir()) == [
        "step-000000000",
        "step-000000008",
    ]


BAD = [
    (["--backbone", "huge"], "unknown backbone 'huge'"),
    (["--backbone", "/nowhere/at/all"], "'/nowhere/at/all' could not be read"),
    (["--data", "vqa9"], "unknown data 'vqa9'"),
    (["--reward", "fun"], "unknown reward 'fun'"),
    (["--budgets", "0", "1"], "budgets are (0.0, 1.0)"),
    (["--budgets", "0.5", "1.5"], "budgets are (0.5, 1.5)"),
    (["--test-budgets", "0.5", "2"], "budget 2 is outside (0, 1]"),
    (["--total-queries", "0"], "--total-queries is 0"),
    (["--learning-rate", "-1"], "--learning-rate is -1; it must be above 0"),
    (["--plans-per-query", "3"], "8 environments do not divide into groups of 3"),
    (["--config", "no.yaml"], "config 'no.yaml' does not exist"),
]


@pytest.mark.parametrize(("arguments", "words"), BAD)
def test_bad_options_end_with_status_2_and_one_line(monkeypatch, place, tmp_path, capsys, arguments, words):
    with pytest.raises(SystemExit) as caught:
        train(monkeypatch, place, tmp_path / "run", *arguments)
    assert caught.value.code == 2
    captured = capsys.readouterr()
    errors = [line for line in captured.err.splitlines() if line.startswith("error:")]
    assert len(errors) == 1 and words in errors[0]
    assert "Traceback" not in captured.err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["run", "nobody"], "unknown policy 'nobody'; use a run folder or one of full, random"),
        (["run"], "no policy given"),
        (["run", "full", "--budgets", "0"], "budget 0 is outside"),
        (["run", "full", "--data", "vqa9"], "unknown data"),
        (["run", "full", "--split", "dev"], "split is 'dev'"),
        (["run", "full", "--limit", "0"], "limit is 0"),
    ],
)
def test_bad_evaluations_end_with_status_2_and_one_line(monkeypatch, place, capsys, arguments, words):
    where = [] if arguments == ["run"] else ["--backbone", place / "vlm"]
    with pytest.raises(SystemExit) as caught:
        command(monkeypatch, eval_main.main, *arguments, *where)
    assert caught.value.code == 2 and words in capsys.readouterr().err


def test_an_existing_folder_is_left_alone(monkeypatch, place, tmp_path, capsys):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("mine")
    with pytest.raises(SystemExit) as caught:
        train(monkeypatch, place, tmp_path / "mine")
    assert caught.value.code == 2 and "exists and is not a run folder" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["notes.txt"]
