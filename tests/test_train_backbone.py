"""The embedded VLM is made by a command that learns, resumes exactly, and saves what plain transformers loads."""

import json
import sys

import pytest
import torch
from safetensors.torch import load_file

import train_backbone
from backbones import load_backbone
from eval import cli
from tests.conftest import make_dataset

OPTIONS = "--steps 6 --plain-share 0.5 --vision-steps 2 --vision-images 4 --images 4 --questions 2 --validate-every 2"


def run(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["train_backbone.py", *map(str, arguments)])
    cli.run(train_backbone.main)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    make_dataset(24).save_to_disk(folder / "data")
    return folder / "data"


def test_a_run_saves_a_backbone_and_resumes_exactly(monkeypatch, data, tmp_path):
    run(monkeypatch, "--data", data, "--out", tmp_path / "whole", *OPTIONS.split())
    step = train_backbone.train_step

    def dying(*arguments):
        if arguments[-1] == 4:
            raise KeyboardInterrupt
        return step(*arguments)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(train_backbone, "train_step", dying)
        run(patch, "--data", data, "--out", tmp_path / "killed", *OPTIONS.split())
    run(monkeypatch, "--out", tmp_path / "killed", "--resume")
    whole, killed = (load_file(tmp_path / name / "model" / "model.safetensors") for name in ("whole", "killed"))
    assert all(torch.equal(whole[name], killed[name]) for name in whole)
    lines = [json.loads(line) for line in (tmp_path / "whole" / "metrics.jsonl").read_text().splitlines()]
    assert "pruned" not in lines[1] and {"full", "pruned", "divergence", "accuracy_full"} <= set(lines[3])
    backbone = load_backbone(str(tmp_path / "whole" / "model"))
    assert backbone.layout.tokens == 64 and backbone.layout.layers == 6


def test_training_lowers_both_losses(data):
    """On 24 questions: from chance to almost nothing; without an update both stay where they were."""
    config = train_backbone.BackboneConfig(
        data=str(data), steps=40, plain_share=0.0, images=8, questions=2, warmup=5, learning_rate=3e-3
    )
    train = train_backbone.load_queries(config.data, "train")
    backbone = train_backbone.build(config, train)
    optimizer = torch.optim.AdamW(backbone.model.parameters())
    batches = train_backbone.Batches(train, backbone, 0)
    before = {name: value.clone() for name, value in backbone.model.named_parameters()}
    history = [train_backbone.train_step(config, backbone, batches, optimizer, step) for step in range(30)]
    first, last = history[0], history[-1]
    assert last["full"] < 0.5 * first["full"] and last["pruned"] < 0.5 * first["pruned"]
    unchanged = [name for name, value in backbone.model.named_parameters() if torch.equal(value, before[name])]
    # CLIP's class token is cut off after the tower and its last norm is not used
    assert all("post_layernorm" in name for name in unchanged), unchanged


def test_a_loss_that_is_not_finite_stops_before_the_update(monkeypatch, data, tmp_path, capsys):
    monkeypatch.setattr(train_backbone.F, "cross_entropy", lambda *_: torch.tensor(float("nan"), requires_grad=True))
    with pytest.raises(SystemExit) as caught:
        run(monkeypatch, "--data", data, "--out", tmp_path / "run", *OPTIONS.split())
    assert caught.value.code == 2
    assert "the loss is nan at step 0; lower --learning-rate" in capsys.readouterr().err
