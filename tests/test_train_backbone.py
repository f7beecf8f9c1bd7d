"""Elastic training: the embedded VLM is made by a command that learns, resumes exactly, and saves what plain
transformers loads; other VLMs are tuned in full or with adapters."""

import json

import pytest
import torch
from datasets import Dataset
from datasets import Image as ImageFeature
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText
from trl import SFTTrainer

import maskgym.training.backbone as train_backbone
from maskgym.backbones import InputError, load_backbone
from maskgym.backbones.loading.load import load_processor
from maskgym.common.run_folder import RunFolder
from maskgym.envs.data.queries import DatasetQueries, load_queries
from maskgym.training.elastic import Collator
from maskgym.training.training_queries import TrainingQueries
from tests.conftest import build_of, command, make_dataset
from tests.families import build_family

OPTIONS = (
    "--steps 6 --plain-share 0.5 --vision-steps 2 --vision-images 4 --images 4 --questions 2 --validate-every 2 "
    "--warmup 2"
)


def run(monkeypatch, *arguments):
    command(monkeypatch, train_backbone.main, *arguments)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    make_dataset(24).save_to_disk(folder / "data")
    return folder / "data"


@pytest.fixture(scope="module")
def families(tmp_path_factory):
    """Random-weight models of other families, saved as on the hub."""
    place = tmp_path_factory.mktemp("families")
    for name in ("llava", "smolvlm"):
        model, processor = build_family(name)
        model.save_pretrained(place / name)
        processor.save_pretrained(place / name)
    return place


def lines(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.slow
def test_a_run_saves_a_backbone_and_resumes_exactly(monkeypatch, data, tmp_path):
    run(monkeypatch, "--data", data, "--out", tmp_path / "whole", *OPTIONS.split())
    step = SFTTrainer.training_step

    def dying(trainer, *arguments):
        if trainer.state.global_step == 5:
            raise KeyboardInterrupt
        return step(trainer, *arguments)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(SFTTrainer, "training_step", dying)
        run(patch, "--data", data, "--out", tmp_path / "killed", *OPTIONS.split())
    assert len(lines(tmp_path / "killed")) == 3
    run(monkeypatch, "--out", tmp_path / "killed", "--resume")
    whole, killed = (load_file(tmp_path / name / "model" / "model.safetensors") for name in ("whole", "killed"))
    assert all(torch.equal(whole[name], killed[name]) for name in whole)
    logged = [
        [{key: value for key, value in line.items() if key != "seconds"} for line in lines(tmp_path / name)]
        for name in ("whole", "killed")
    ]
    assert logged[0] == logged[1]
    assert "pruned" not in logged[0][1] and {"full", "pruned", "divergence", "accuracy_full"} <= set(logged[0][3])
    backbone = load_backbone(str(tmp_path / "whole" / "model"))
    assert backbone.layout.tokens == 64 and backbone.layout.layers == 6


@pytest.mark.slow
def test_a_finished_run_goes_on_for_longer(monkeypatch, data, tmp_path, capsys):
    """At the learning rates of a run that was begun for so many steps; nothing is written down twice."""
    rates, step = [], SFTTrainer.training_step

    def observed(trainer, *arguments):
        rates.append(trainer.optimizer.param_groups[0]["lr"])
        return step(trainer, *arguments)

    monkeypatch.setattr(SFTTrainer, "training_step", observed)
    out, small = tmp_path / "run", ["--data", data, *OPTIONS.split(), "--vision-steps", 0]
    run(monkeypatch, *small, "--out", out, "--steps", 4)
    first = lines(out)
    run(monkeypatch, "--out", out, "--resume", "--steps", 6)
    run(monkeypatch, *small, "--out", tmp_path / "whole")
    assert len(rates) == 4 + 2 + 6 and rates[4:6] == rates[10:12] and rates[3] != rates[9]
    assert lines(out)[: len(first)] == first
    assert [line["step"] for line in lines(out)] == [2, 4, 6] == [line["step"] for line in lines(tmp_path / "whole")]
    assert RunFolder(out).config()["steps"] == 6 and "6 steps in place of 4, from 4 on" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        run(monkeypatch, "--out", out, "--resume", "--steps", 5)
    assert "--steps is 5, but 6 are done" in capsys.readouterr().err


@pytest.mark.slow
def test_training_lowers_both_losses(monkeypatch, data, tmp_path):
    """On 24 questions, under random plans from the start; the null: a learning rate of nothing changes nothing."""
    options = "--steps 30 --plain-share 0 --vision-steps 0 --images 8 --questions 2 --elastic-questions 2 --warmup 5 "
    for name, rate in (("learns", 3e-3), ("idles", 1e-12)):
        more = f"--learning-rate {rate} --muon-rate {rate} --validate-every 10"
        run(monkeypatch, "--data", data, "--out", tmp_path / name, *(options + more).split())
    first, _, last = lines(tmp_path / "learns")
    assert last["full"] < 0.5 * first["full"] and last["pruned"] < 0.6 * first["pruned"]
    first, _, last = lines(tmp_path / "idles")
    assert last["full"] > 0.8 * first["full"] and last["pruned"] > 0.8 * first["pruned"]


@pytest.mark.parametrize("name", ["llava", "smolvlm"])
@pytest.mark.slow
def test_lora_trains_every_adapter_and_nothing_else(monkeypatch, families, data, tmp_path, name):
    base = families / name
    options = "--lora-rank 4 --steps 24 --plain-share 0.25 --images 8 --questions 2 --elastic-questions 2 --warmup 2 "
    more = "--learning-rate 2e-2 --validate-every 6"
    run(monkeypatch, "--backbone", base, "--data", data, "--out", tmp_path / "run", *(options + more).split())
    logged = lines(tmp_path / "run")
    assert "pruned" not in logged[0] and logged[-1]["full"] < 0.8 * logged[0]["full"]
    assert logged[-1]["pruned"] < logged[1]["pruned"]
    adapters = load_file(tmp_path / "run" / "model" / "adapter_model.safetensors")
    assert len(adapters) == 2 * 7 * 3, "A and B of the seven projections of three layers"
    # B starts at zero, so it changed if it is anything else; A of a B that moves gets a gradient.
    assert all(value.abs().max() > 0 for value in adapters.values())
    plain = AutoModelForImageTextToText.from_pretrained(base)
    before = {key: value.clone() for key, value in plain.state_dict().items()}
    with_adapters = PeftModel.from_pretrained(plain, tmp_path / "run" / "model")
    frozen = {key.removeprefix("base_model.model."): value for key, value in with_adapters.state_dict().items()}
    for key, value in before.items():
        module, _, kind = key.rpartition(".")
        assert torch.equal(frozen.get(key, frozen.get(f"{module}.base_layer.{kind}")), value)
    check_loaded(tmp_path / "run" / "model", with_adapters)


def check_loaded(folder, with_adapters):
    """``load_backbone`` merges the adapters: it answers as PEFT's model does, and not as the base."""
    backbone = load_backbone(str(folder))
    query = DatasetQueries(make_dataset(2), "made", "train")[0]
    inputs = backbone.family.process([query.image], [backbone.prompt(query.question)])
    encoding = backbone.encode([query])
    with torch.no_grad():
        ours = backbone.prefill(encoding, backbone.full(encoding))[0][0]
        theirs = with_adapters(**inputs).logits[0, -1]
        with with_adapters.disable_adapter():
            base = with_adapters(**inputs).logits[0, -1]
    assert torch.allclose(ours, theirs, atol=1e-4) and (ours - base).abs().max() > 1e-2


@pytest.mark.slow
def test_merged_adapters_are_a_plain_model(monkeypatch, families, data, tmp_path):
    options = "--lora-rank 2 --merge --steps 2 --plain-share 0 --images 4 --warmup 1 --validate-every 2"
    run(monkeypatch, "--backbone", families / "llava", "--data", data, "--out", tmp_path / "run", *options.split())
    model = tmp_path / "run" / "model"
    assert not (model / "adapter_config.json").exists()
    base, merged = (load_file(folder / "model.safetensors") for folder in (families / "llava", model))
    assert base.keys() == merged.keys()
    changed = {name for name in base if not torch.equal(base[name], merged[name])}
    assert changed and all("language_model.model.layers" in name and "_proj" in name for name in changed)
    assert load_processor(model).chat_template


def test_rare_answers_are_drawn_more_often(data):
    rows = make_dataset(24).to_dict()
    rows["answers"] = [["yes"]] * 23 + [["rare"]]
    queries = DatasetQueries(Dataset.from_dict(rows).cast_column("image", ImageFeature()), "made", "train")
    config = train_backbone.BackboneConfig(steps=400, images=12, questions=2)
    drawn = train_backbone.draw(config, queries)["queries"][:]
    assert len(drawn) == 400 * 12 and {len(row) for row in drawn} == {2}
    first = [row[0] for row in drawn if row[0] >= 22]
    assert first.count(23) > 3 * first.count(22) > 0, "of two questions about one image, the first may run pruned too"


def test_answers_that_cannot_be_learnt_are_named():
    backbone = build_of("llava")
    rows = make_dataset(2).to_dict()
    rows["answers"] = [["zebra"], ["red"]]

    class Unanswered(DatasetQueries):
        def text(self, number):
            id, question, answers = super().text(number)
            return id, question, answers if number == 0 else ()

    queries = Unanswered(Dataset.from_dict(rows).cast_column("image", ImageFeature()), "m", "t")
    collate = Collator(TrainingQueries(backbone, queries, max_failed=0))
    with pytest.raises(InputError, match="'q0': the tokenizer cannot represent the answer 'zebra'"):
        collate([{"queries": [0]}])
    with pytest.raises(InputError, match="'q1' has no answers; training needs one"):
        collate([{"queries": [1]}])


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (
            "--learning-rate 1e30 --vision-steps 0",
            "the loss is nan at step 2 (queries q8, q9, q6, …); lower --learning-rate (now 1e+30)",
        ),
        ("--learning-rate nan", "--learning-rate is nan; it must be a finite number"),
        ("--lora-rank -1 --backbone tiny", "--lora-rank is -1; it must be at least 0"),
        ("--elastic-questions 9", "--elastic-questions is 9; it must be at least 1 and at most --questions (2)"),
        ("--lora-rank 4", "--lora-rank needs a trained model to adapt; name one with --backbone"),
        ("--budgets 0.5 0.1", "--budgets are (0.5, 0.1)"),
        ("--plain-share 2", "--plain-share is 2"),
        ("--steps 0", "--steps is 0"),
        ("--backbone /nowhere", "'/nowhere' could not be read"),
    ],
)
@pytest.mark.slow
def test_bad_options_are_named(monkeypatch, data, tmp_path, capsys, arguments, words):
    more = OPTIONS.split() if "--steps" not in arguments else []
    with pytest.raises(SystemExit) as caught:
        run(monkeypatch, "--data", data, "--out", tmp_path / "run", *more, *arguments.split())
    assert caught.value.code == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert words in error


def test_default_data_is_there_for_all_splits():
    assert [len(load_queries("easy-vqa+scenes:images=2", split)) for split in ("validation", "test")] == [
        len(load_queries("easy-vqa", "validation")) + 16,
        9673 + 16,
    ]
