"""Numbers that are not finite stop a training before it learns from them; narrow types stay near float32; and equal
seeds give equal bits."""

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import maskgym.training.backbone as train_backbone
import maskgym.training.gumbel as train_gumbel
import maskgym.training.rl as train_rl
from maskgym.backbones import EncodingBank, InputError, load_backbone
from maskgym.common.determinism import deterministic
from maskgym.common.finite import check_finite, refuse_bad_gradients
from maskgym.envs.core import MaskingCore
from maskgym.training.checkpoints import load_checkpoint
from maskgym.training.muon import MuonAdamW
from tests.conftest import command, random_masks
from tests.test_train_backbone import OPTIONS as BACKBONE_OPTIONS
from tests.test_train_gumbel import train as train_by_relaxation
from tests.test_train_rl import train

SELF = "tests.test_numerics"


def fails(capsys, function, *arguments):
    """The one line with which a command ends."""
    with pytest.raises(SystemExit) as caught:
        function(*arguments)
    assert caught.value.code == 2
    _, *errors = capsys.readouterr().err.split("error: ")
    assert len(errors) == 1 and errors[0].count("\n") == 1
    return errors[0].strip()


def newest_weights(out):
    tensors, state = load_checkpoint(out / "checkpoints")
    named = {name: value for name, value in tensors.items() if name.startswith(("policy.", "controller."))}
    assert named and all(value.isfinite().all() for value in named.values())
    return state["queries"]


class Later:
    """A reward that is not finite for one query from its fifth call on."""

    calls = 0

    def __call__(self, terms):
        self.calls += 1
        values = terms.accuracy.copy()
        if self.calls > 4:
            values[3] = np.inf
        return values


@pytest.mark.slow
def test_a_reward_that_is_not_finite_names_step_and_query(monkeypatch, place, tmp_path, capsys):
    monkeypatch.setitem(globals(), "later", Later())
    error = fails(capsys, train, monkeypatch, place, tmp_path / "run", "--reward", f"{SELF}:later")
    assert f"reward '{SELF}:later' returned inf in 1 of 8 rows (queries q" in error
    assert error.endswith("after 8 queries, the last checkpoint is kept")
    assert newest_weights(tmp_path / "run") == 8


@pytest.mark.parametrize("kind", ["weights", "gradients"])
def test_ppo_stops_before_the_update(monkeypatch, place, tmp_path, capsys, kind):
    """Weights spoilt between two updates are met by the logits, a gradient by the optimiser."""
    rollout = train_rl.RunCallback._on_rollout_end

    def spoiling(self):
        rollout(self)
        if self.num_timesteps == 32:
            parameter = next(iter(self.model.policy.controller.parameters()))
            if kind == "weights":
                parameter.data[0] = torch.nan
            else:
                parameter.register_hook(lambda gradient: gradient * torch.inf)

    monkeypatch.setattr(train_rl.RunCallback, "_on_rollout_end", spoiling)
    error = fails(capsys, train, monkeypatch, place, tmp_path / "run", "--checkpoint-every", 4)
    said = {"weights": "the controller's logits are not finite in 8 of 8 rows", "gradients": "gradients are not finite"}
    assert said[kind] in error and "(queries q" in error and "after 8 queries, the last checkpoint is kept" in error
    assert newest_weights(tmp_path / "run") == 4


@pytest.mark.parametrize("kind", ["loss", "gradients"])
@pytest.mark.slow
def test_relaxed_training_stops_before_the_update(monkeypatch, place, tmp_path, capsys, kind):
    step = train_gumbel.Trainer.step

    def spoiling(self):
        if self.queries == 72:
            parameter = next(iter(self.controller.parameters()))
            if kind == "loss":
                parameter.data[0] = torch.nan
            else:
                parameter.register_hook(lambda gradient: gradient * torch.inf)
        return step(self)

    monkeypatch.setattr(train_gumbel.Trainer, "step", spoiling)
    error = fails(capsys, train_by_relaxation, monkeypatch, place, tmp_path / "run")
    said = {"loss": "the loss is nan", "gradients": "gradients are not finite"}
    assert f"{said[kind]} after 72 queries, in the next batch (queries q" in error
    assert newest_weights(tmp_path / "run") == 64


@pytest.mark.slow
def test_backbone_training_stops_before_the_update(monkeypatch, place, tmp_path, capsys):
    """By a gradient; a loss is in ``test_train_backbone``."""
    losses = train_backbone.ElasticTrainer.compute_loss

    def spoiling(self, *arguments, **named):
        if self.state.global_step == 3:
            weight = self.backbone.decoder.model.embed_tokens.weight
            weight.register_hook(lambda gradient: gradient * torch.nan)
        return losses(self, *arguments, **named)

    monkeypatch.setattr(train_backbone.ElasticTrainer, "compute_loss", spoiling)
    where = ["--data", place / "data", "--out", tmp_path / "run", *BACKBONE_OPTIONS.split()]
    error = fails(capsys, command, monkeypatch, train_backbone.main, *where)
    assert "gradients are not finite at step 3 (queries q" in error
    saved = load_file(tmp_path / "run" / "checkpoints" / "checkpoint-2" / "model.safetensors")
    assert all(value.isfinite().all() for value in saved.values())


def test_a_vlm_whose_logits_are_not_finite_is_named(place, tmp_path):
    """Whatever the reward: accuracy alone would not show it. The null: the VLM as it was."""
    folder = tmp_path / "vlm"
    folder.mkdir()
    for path in (place / "vlm").iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    weights = load_file(folder / "model.safetensors")
    (norm,) = (name for name in weights if name.endswith("model.norm.weight"))
    save_file({**weights, norm: weights[norm] * torch.nan}, folder / "model.safetensors", {"format": "pt"})
    for vlm, bad in ((place / "vlm", False), (folder, True)):
        core = MaskingCore(load_backbone(str(vlm)), str(place / "data"), reward="accuracy")
        actions = np.ones((2, core.layout.size), np.int8)
        numbers, budgets = np.array([0, 5]), np.ones(2, np.float32)
        if not bad:
            assert core.step(numbers, budgets, actions).rewards.shape == (2,)
            continue
        with pytest.raises(InputError, match=r"the VLM's logits are not finite in 2 of 2 rows \(queries q0, q5"):
            core.step(numbers, budgets, actions)


def test_only_the_rows_that_are_not_finite_are_named():
    values = torch.tensor([[0.0, 1.0], [torch.nan, 0.0], [0.0, torch.inf]])
    with pytest.raises(InputError, match=r"they are not finite in 2 of 3 rows \(queries b, c\); look"):
        check_finite("they are", values, ["a", "b", "c"], "look")
    check_finite("they are", values[:1], ["a"], "look")


@pytest.mark.parametrize("make", [torch.optim.Adam, lambda parameters: MuonAdamW(parameters, 0.1, 0.1)])
def test_no_optimiser_takes_a_step_along_a_bad_gradient(make):
    """Of any kind. The null: it takes one along a good gradient."""
    weight = torch.nn.Parameter(torch.ones(4, 4))
    optimizer = make([("of.layers.0", weight)] if make is not torch.optim.Adam else [weight])
    refuse_bad_gradients(optimizer, lambda: "here")
    for bad in (torch.nan, torch.inf):
        weight.grad = torch.zeros(4, 4)
        weight.grad[1, 2] = bad
        with pytest.raises(InputError, match="gradients are not finite here"):
            optimizer.step()
        assert (weight == 1).all()
    weight.grad = torch.eye(4)
    optimizer.step()
    assert (weight != 1).any()


TOLERANCE = {torch.bfloat16: 0.05, torch.float16: 0.01}
"""Of logits, relative to their spread: bfloat16 has 8 bits of precision, float16 11."""


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_narrow_types_stay_near_float32(tiny, dtype, source):
    """Every plan's logits, executed; the null: another plan's are farther away than the tolerance."""
    narrow = load_backbone("tiny", dtype)
    logits = []
    for backbone in (tiny, narrow):
        encoding = EncodingBank(backbone, source).gather(range(8))
        masks = backbone.restrict(encoding, random_masks(backbone, 8))
        logits.append(backbone.prefill(encoding, masks)[0].float())
    exact_BV, near_BV = logits
    spread = exact_BV.std()
    off_B = (near_BV - exact_BV).abs().amax(1) / spread
    assert 0 < off_B.max() < TOLERANCE[dtype]
    full_BV = tiny.prefill(EncodingBank(tiny, source).gather(range(8)), tiny.full(encoding))[0]
    assert (full_BV - exact_BV).abs().amax(1).min() / spread > TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.slow
def test_a_training_on_a_narrow_vlm_stays_finite(monkeypatch, place, tmp_path, dtype):
    train(monkeypatch, place, tmp_path / "run", "--dtype", dtype, "--total-queries", 8)
    assert newest_weights(tmp_path / "run") == 8


def observing(terms):
    observing.seen.append(torch.are_deterministic_algorithms_enabled())
    return terms.accuracy - 0.1 * terms.flops


def scattering(terms):
    """Uses an operation that PyTorch has no deterministic implementation of."""
    values = torch.zeros(len(terms)).put_(torch.arange(len(terms)), torch.tensor(terms.accuracy).float())
    return values.numpy()


@pytest.mark.parametrize("wanted", [True, False])
@pytest.mark.slow
def test_deterministic_trainings_are_equal_to_the_last_bit(monkeypatch, place, tmp_path, wanted):
    observing.seen = []
    found = []
    more = ["--deterministic"] if wanted else []
    for name in ("first", "second"):
        train(monkeypatch, place, tmp_path / name, "--reward", f"{SELF}:observing", "--total-queries", 8, *more)
        found.append((tmp_path / name / "controller.safetensors").read_bytes())
        found.append((tmp_path / name / "metrics.jsonl").read_bytes())
    assert found[:2] == found[2:] and set(observing.seen) == {wanted}
    assert not torch.are_deterministic_algorithms_enabled(), "what follows in this process is as it was"


@pytest.mark.slow
def test_deterministic_trainings_refuse_other_operations(monkeypatch, place, tmp_path, capsys):
    """The null: without the option the same reward works."""
    options = ["--reward", f"{SELF}:scattering", "--total-queries", 4]
    train(monkeypatch, place, tmp_path / "free", *options)
    capsys.readouterr()
    error = fails(capsys, train, monkeypatch, place, tmp_path / "strict", *options, "--deterministic")
    assert "put_" in error and "does not have a deterministic implementation" in error


@pytest.mark.parametrize("script", [train_gumbel, train_backbone])
@pytest.mark.slow
def test_every_training_can_be_deterministic(monkeypatch, place, tmp_path, script):
    """And all of what it needs has a deterministic implementation."""
    options = "--total-queries 8 --batch-size 8 --budgets 0.6 1 --test-budgets 0.6".split()  # noqa: SIM905
    own = [*options, "--backbone", place / "vlm"] if script is train_gumbel else BACKBONE_OPTIONS.split()
    seen = []
    log = script.RunFolder.log

    def looking(*arguments, **metrics):
        seen.append(torch.are_deterministic_algorithms_enabled())
        return log(*arguments, **metrics)

    monkeypatch.setattr(script.RunFolder, "log", looking)
    command(monkeypatch, script.main, *own, "--data", place / "data", "--out", tmp_path / "run", "--deterministic")
    assert set(seen) == {True}


@pytest.mark.parametrize(("script", "where"), [(train_rl, "build"), (train_gumbel, "run"), (train_backbone, "run")])
def test_a_deterministic_training_that_is_refused_leaves_no_folder(monkeypatch, place, tmp_path, script, where):
    """For one that uses another operation before its first checkpoint, the mended command finds the place free."""
    monkeypatch.setattr(script, where, lambda *_: torch.zeros(2).put_(torch.tensor([0]), torch.ones(1)))
    with pytest.raises(SystemExit) as caught:
        command(monkeypatch, script.main, "--data", place / "data", "--out", tmp_path / "run", "--deterministic")
    assert caught.value.code == 2 and not any(tmp_path.iterdir())


def test_a_refused_operation_says_what_to_do(monkeypatch):
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    with pytest.raises(InputError, match="leave out --deterministic"), deterministic(True):
        torch.zeros(2).put_(torch.tensor([0]), torch.ones(1))
    with pytest.raises(RuntimeError, match="something else"), deterministic(True):
        raise RuntimeError("something else")
