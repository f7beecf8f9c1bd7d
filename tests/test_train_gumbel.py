"""The command that trains by relaxation: from options to a run folder, resumed exactly, and clear about bad input."""

import json
import shutil
from contextlib import nullcontext

import pytest
import torch
from safetensors.torch import load_file

import maskgym.eval.__main__ as eval_main
import maskgym.training.gumbel as train_gumbel
import maskgym.training.rl as train_rl
from maskgym.backbones import EncodingBank, load_backbone
from maskgym.backbones.plans.survivors import POSITIONS
from maskgym.common.run_folder import RunFolder
from maskgym.common.tracking import Tracker
from maskgym.envs import load_queries
from maskgym.policies.controller.learned import load_controller, planner_of
from maskgym.training.controller_runs import RunJournal
from tests.conftest import command

OPTIONS = (
    "--budgets 0.6 1.0 --test-budgets 0.6 1.0 --batch-size 8 --total-queries 256 --checkpoint-every 64 "
    "--validate-every 128"
)


def train(monkeypatch, place, out, *more):
    where = ["--backbone", place / "vlm", "--data", place / "data", "--out", out]
    command(monkeypatch, train_gumbel.main, *where, *OPTIONS.split(), *more)


def lines(out):
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("estimator", ["gumbel", "soft-topk", "adallava-l", "adallava-h"])
@pytest.mark.slow
def test_a_run_leaves_everything_that_is_promised(monkeypatch, place, tmp_path, capsys, estimator):
    adallava = estimator.startswith("adallava")
    train(monkeypatch, place, tmp_path / "run", "--estimator", estimator, "--distillation", 0 if adallava else 0.5)
    files = (
        "config.yaml command.txt environment.json metrics.jsonl timing.jsonl result.json controller.safetensors "
        "controller.json checkpoints tradeoff.png training.png"
    )
    assert set(files.split()) == {path.name for path in (tmp_path / "run").iterdir()}
    records = json.loads((tmp_path / "run" / "result.json").read_text())
    assert [(record["policy"], record["budget"]) for record in records][3:] == [(estimator, 0.6), (estimator, 1.0)]
    assert all(record["budget_violations"] == 0 for record in records)
    printed = capsys.readouterr().out
    assert f"| {estimator} " in printed and "queries/s in training, peak memory" in printed
    gap = [line.split("|")[2:4] for line in printed.splitlines() if line.startswith(("| 0.60 ", "| 1.00 "))]
    assert len(gap) == 2 and all(
        float(executed) <= budget for (_, executed), budget in zip(gap, (60, 100), strict=True)
    )
    logged = lines(tmp_path / "run")
    assert [line["queries"] for line in logged if "validation" in line] == [128, 256]
    parts = {"answer", "soft_flops", "reward"} | ({"cost"} if estimator == "gumbel" else set())
    parts |= set() if adallava else {"distillation"}
    assert parts <= set(logged[0])
    options = ["--budgets", "0.6", "--json", tmp_path / "again.json", "--data", place / "data"]
    command(monkeypatch, eval_main.main, "run", tmp_path / "run", *options)
    again = json.loads((tmp_path / "again.json").read_text())
    assert again[0] == {**records[3], "policy": "run"}


class Killed(BaseException):
    pass


@pytest.mark.parametrize(
    ("at", "begun", "estimator"),
    [(0, 128, "gumbel"), (72, 256, "gumbel"), (200, 256, "gumbel"), (72, 256, "adallava-h")],
)
@pytest.mark.slow
def test_killed_and_resumed_is_never_killed(monkeypatch, place, tmp_path, at, begun, estimator):
    """Also where fewer queries were asked for, until it was killed before the first step."""
    train(monkeypatch, place, tmp_path / "whole", "--estimator", estimator)
    step = train_gumbel.Trainer.step

    def dying(self):
        if self.queries == at:
            raise Killed
        return step(self)

    with monkeypatch.context() as patch:
        patch.setattr(train_gumbel.Trainer, "step", dying)
        with pytest.raises(Killed):
            train(monkeypatch, place, tmp_path / "killed", "--estimator", estimator, "--total-queries", begun)
    longer = ["--total-queries", 256] if begun < 256 else []
    command(monkeypatch, train_gumbel.main, "--out", tmp_path / "killed", "--resume", *longer)
    whole, resumed = (load_file(tmp_path / name / "controller.safetensors") for name in ("whole", "killed"))
    assert all((whole[name] == resumed[name]).all() for name in whole)
    assert lines(tmp_path / "whole") == lines(tmp_path / "killed")


@pytest.mark.parametrize("estimator", ["soft-topk", "adallava-l"])
@pytest.mark.slow
def test_a_finished_run_goes_on_for_longer(monkeypatch, place, tmp_path, capsys, estimator):
    """With no line twice and none missing, also where a line's steps are not full; or less long, but not less than it
    is."""
    small = ["--estimator", estimator, "--test-queries", 4, "--validate-every", 64]
    train(monkeypatch, place, tmp_path / "run", *small, "--total-queries", 96)
    first, weights = lines(tmp_path / "run"), load_file(tmp_path / "run" / "controller.safetensors")
    assert [line["queries"] for line in first] == [64, 64, 96, 96]
    for total in (160, 200, 160, 152):
        capsys.readouterr()
        again = ["--out", tmp_path / "run", "--resume", "--total-queries", total]
        with pytest.raises(SystemExit) if total == 152 else nullcontext():
            command(monkeypatch, train_gumbel.main, *again)
        if total == 200:  # asked for by mistake, and the run was stopped at once
            (tmp_path / "run" / "checkpoints" / "step-000000200").rename(tmp_path / "removed")
    assert "--total-queries is 152, but 160 are done" in capsys.readouterr().err
    logged = lines(tmp_path / "run")
    assert logged[:4] == first and [line["queries"] for line in logged] == [64, 64, 96, 96, 160, 160]
    assert [line["queries"] for line in logged if "validation" in line] == [64, 96, 160]
    changed = load_file(tmp_path / "run" / "controller.safetensors")
    assert any((weights[name] != changed[name]).any() for name in weights)
    assert RunFolder(tmp_path / "run").config()["total_queries"] == 160


@pytest.mark.slow
def test_other_seeds_give_other_controllers(monkeypatch, place, tmp_path):
    for seed in ("0", "1"):
        train(monkeypatch, place, tmp_path / seed, "--seed", seed)
    first, second = (load_file(tmp_path / seed / "controller.safetensors") for seed in ("0", "1"))
    assert any((first[name] != second[name]).any() for name in first)


def likelihood(trainer, batches=12):
    """Mean log-likelihood of the answers under the trainer's relaxed plans, on fixed draws."""
    torch.manual_seed(0)
    train_gumbel.np.random.seed(0)
    parts = [trainer.learner.losses(trainer.draw(), 1.0) for _ in range(batches)]
    return sum(float(part["log_likelihood"]) for part in parts) / batches


@pytest.mark.parametrize("estimator", ["gumbel", "soft-topk", "adallava-l", "adallava-h"])
@pytest.mark.slow
def test_training_raises_the_answers_likelihood(place, tmp_path, estimator):
    """Null: a learning rate of nothing leaves it where it was."""
    gains = {}
    for rate in (1e-2, 1e-12):
        config = train_gumbel.GumbelConfig(
            backbone=str(place / "vlm"),
            data=str(place / "data"),
            estimator=estimator,
            budgets=(0.6, 0.7),
            batch_size=32,
            total_queries=32 * 50,
            learning_rate=rate,
            validate_queries=4,
        )
        backbone = load_backbone(config.backbone)
        folder = RunFolder.create(tmp_path / str(rate), config)
        journal = RunJournal(config, folder, backbone, Tracker(None, folder.path, {}), estimator)
        trainer = train_gumbel.Trainer(config, backbone, journal)
        before = likelihood(trainer)
        torch.manual_seed(1)
        for _ in range(50):
            trainer.step()
        gains[rate] = likelihood(trainer) - before
    assert gains[1e-2] > 0.05 and abs(gains[1e-12]) < 0.01


@pytest.mark.parametrize("first", ["gumbel", "rl"])
@pytest.mark.slow
def test_a_run_can_start_from_one_of_the_other_kind(monkeypatch, place, tmp_path, first):
    train(monkeypatch, place, tmp_path / "gumbel")
    options = "--envs 8 --rollout-steps 2 --batch-size 8 --total-queries 16 --budgets 0.6 1 --test-budgets 0.6"
    where = ["--backbone", place / "vlm", "--data", place / "data"]
    folders = ["--out", tmp_path / "rl", "--init-from", tmp_path / "gumbel"]
    command(monkeypatch, train_rl.main, *where, *options.split(), *folders)
    if first == "rl":
        train(monkeypatch, place, tmp_path / "then", "--init-from", tmp_path / "rl", "--learning-rate", 1e-12)
        backbone = load_backbone(str(place / "vlm"))
        then, rl = (load_controller(tmp_path / name, backbone).state_dict() for name in ("then", "rl"))
        assert all(torch.allclose(then[name], rl[name], atol=1e-6) for name in rl)
    assert (tmp_path / "rl" / "result.json").exists()


@pytest.mark.parametrize("script", ["train_gumbel", "train_rl"])
@pytest.mark.slow
def test_axes_left_out_stay_full_and_are_saved(monkeypatch, place, tmp_path, script):
    main = {"train_gumbel": train_gumbel, "train_rl": train_rl}[script].main
    extra = "--envs 8 --rollout-steps 2" if script == "train_rl" else ""
    options = f"--batch-size 8 --total-queries 32 --budgets 0.8 1 --test-budgets 0.8 {extra}".split()
    where = ["--backbone", place / "vlm", "--data", place / "data", "--out", tmp_path / "run"]
    command(monkeypatch, main, *where, *options, "--axes", "tokens")
    backbone = load_backbone(str(place / "vlm"))
    assert load_controller(tmp_path / "run", backbone).config.axes == ("tokens",)
    records = json.loads((tmp_path / "run" / "result.json").read_text())
    assert records[1]["policy"] == "random-tokens"
    for record in records:
        assert (record["kept_heads"], record["kept_layers"]) == (12, 3) and record["budget_violations"] == 0
    assert records[-1]["kept_tokens"] < 16


@pytest.mark.parametrize("script", ["train_gumbel", "train_rl"])
@pytest.mark.parametrize("rule", ["threshold", "fill"])
@pytest.mark.slow
def test_a_controller_keeps_the_layout_that_it_was_trained_with(monkeypatch, place, tmp_path, script, rule):
    main = {"train_gumbel": train_gumbel, "train_rl": train_rl}[script].main
    extra = "--envs 8 --rollout-steps 2" if script == "train_rl" else ""
    options = f"--batch-size 8 --total-queries 32 --budgets 0.6 1 --test-budgets 0.7 --rule {rule} {extra}".split()
    where = ["--backbone", place / "vlm", "--data", place / "data", "--out", tmp_path / "run"]
    command(monkeypatch, main, *where, *options, "--positions", "restored")
    backbone = load_backbone(str(place / "vlm"))
    controller = load_controller(tmp_path / "run", backbone)
    assert controller.config.positions == "restored"
    encoding = EncodingBank(backbone, load_queries(str(place / "data"), "test")).gather(range(4))
    masks = planner_of(controller, backbone, "x").plan(encoding, torch.full((4,), 0.7, dtype=torch.float64))
    assert (masks.survivors.positions == POSITIONS.index("restored")).all() and masks.survivors.merged.all()
    assert json.loads((tmp_path / "run" / "result.json").read_text())[-1]["budget_violations"] == 0


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--axes", "layers", "--merge"], "--merge has no effect where --axes are layers; leave it out"),
        (["--estimator", "adallava-l", "--positions", "restored"], "--positions has no effect on adallava-l"),
        (["--axes", "width"], "the axes are width; they must be some of tokens, heads, layers"),
        (["--temperatures", "0.1", "1"], "--temperatures is (0.1, 1.0)"),
        (["--cost-weight", "-1"], "--cost-weight is -1"),
        (["--tune-backbone", "lora", "--tune-rate", "0"], "--tune-rate is 0; it must be above 0"),
        (["--budgets", "0.8", "0.2"], "budgets are (0.8, 0.2)"),
        (["--batch-size", "0"], "--batch-size is 0"),
        (["--init-from", "nowhere"], "no readable controller in 'nowhere'"),
        (["--learning-rate", "1e30"], "the loss is nan after"),
        (["--estimator", "adallava-l", "--axes", "layers"], "--axes has no effect on adallava-l; leave it out"),
        (["--estimator", "adallava-l", "--prefix-layers", "3"], "3 prefix layers do not fit a backbone of 3 layers"),
        (["--estimator", "adallava-h", "--head-group", "3"], "groups of 3 heads do not fit 4 head slots"),
    ],
)
def test_bad_options_end_with_status_2_and_one_line(monkeypatch, place, tmp_path, capsys, arguments, words):
    with pytest.raises(SystemExit) as caught:
        train(monkeypatch, place, tmp_path / "run", *arguments)
    assert caught.value.code == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
    assert len(errors) == 1 and words in errors[0]


@pytest.mark.parametrize("script", ["train_gumbel", "train_rl"])
@pytest.mark.parametrize("way", ["lora", "full"])
@pytest.mark.slow
def test_a_tuned_backbone_learns_is_saved_and_resumed(monkeypatch, place, tmp_path, script, way):
    """Null: without the option the run has no model of its own, and its backbone is the one it was given."""
    main = {"train_gumbel": train_gumbel, "train_rl": train_rl}[script].main
    extra = "--envs 8 --rollout-steps 2" if script == "train_rl" else ""
    options = f"--batch-size 8 --total-queries 64 --checkpoint-every 16 --budgets 0.6 1 --test-budgets 0.8 {extra}"
    where = ["--backbone", place / "vlm", "--data", place / "data", *options.split(), "--tune-rate", 0.01]
    for name, more in (("tuned", ["--tune-backbone", way]), ("plain", [])):
        command(monkeypatch, main, *where, *more, "--out", tmp_path / name)
    assert not (tmp_path / "plain" / "model").exists()
    assert RunFolder(tmp_path / "plain").backbone() == str(place / "vlm")
    base = load_backbone(str(place / "vlm")).model.state_dict()
    tuned = load_backbone(RunFolder(tmp_path / "tuned").backbone()).model.state_dict()
    changed = {name for name in base if not torch.equal(base[name], tuned[name])}
    assert changed and all("language_model" in name and "embed_tokens" not in name for name in changed)
    options = ["--budgets", "0.8", "--json", tmp_path / "again.json", "--data", place / "data"]
    command(monkeypatch, eval_main.main, "run", tmp_path / "tuned", *options)
    again = json.loads((tmp_path / "again.json").read_text())[0]
    first = json.loads((tmp_path / "tuned" / "result.json").read_text())[-1]
    assert (again["accuracy"], again["kept_tokens"]) == (first["accuracy"], first["kept_tokens"])
    newest = sorted((tmp_path / "tuned" / "checkpoints").glob("step-*"))[-1]
    shutil.rmtree(newest)
    command(monkeypatch, main, "--out", tmp_path / "tuned", "--resume")
    resumed = load_backbone(RunFolder(tmp_path / "tuned").backbone()).model.state_dict()
    assert all(torch.equal(tuned[name], resumed[name]) for name in tuned)


@pytest.mark.slow
def test_a_controller_of_another_width_is_named(monkeypatch, place, tmp_path, capsys):
    train(monkeypatch, place, tmp_path / "narrow", "--width", 8)
    with pytest.raises(SystemExit):
        train(monkeypatch, place, tmp_path / "wide", "--init-from", tmp_path / "narrow")
    assert "of width 8, this run one of width 48; give --width 8" in capsys.readouterr().err


def test_relaxed_training_leaves_the_backbone_alone(place, tmp_path):
    config = train_gumbel.GumbelConfig(backbone=str(place / "vlm"), data=str(place / "data"), batch_size=4)
    backbone = load_backbone(config.backbone)
    before = {name: value.clone() for name, value in backbone.model.state_dict().items()}
    folder = RunFolder.create(tmp_path / "run", config)
    journal = RunJournal(config, folder, backbone, Tracker(None, folder.path, {}), "gumbel")
    train_gumbel.Trainer(config, backbone, journal).step()
    assert all(torch.equal(value, before[name]) for name, value in backbone.model.state_dict().items())
    assert isinstance(journal.validation, EncodingBank)
