import dataclasses
import json
from pathlib import Path

import pytest
import torch
import yaml

from maskgym.backbones import InputError
from maskgym.common.atomic import write_atomically
from maskgym.common.run_folder import RunFolder, environment
from maskgym.eval.cli import parse
from maskgym.eval.measure.evaluate import check_budgets
from maskgym.training.checkpoints import load_checkpoint, save_checkpoint


@dataclasses.dataclass
class Options:
    """Options."""

    steps: int = 3
    """How many."""
    budgets: tuple[float, float] = (0.2, 1.0)
    """Between."""
    resume: bool = False
    """Continue."""
    out: Path = Path("nowhere")
    """Folder."""


def test_a_run_folder_says_what_the_run_was(tmp_path):
    folder = RunFolder.create(tmp_path / "run", Options(steps=5))
    assert yaml.safe_load((folder.path / "config.yaml").read_text()) == {
        "steps": 5,
        "budgets": [0.2, 1.0],
    }
    assert "pytest" in (folder.path / "command.txt").read_text()
    saved = json.loads((folder.path / "environment.json").read_text())
    assert saved["torch"] == torch.__version__ and set(saved) == set(environment())
    folder.log(step=1, loss=0.5)
    folder.log(step=2, loss=0.25)
    assert folder.metrics() == [{"step": 1, "loss": 0.5}, {"step": 2, "loss": 0.25}]
    folder.truncate_metrics(1)
    assert folder.metrics() == [{"step": 1, "loss": 0.5}]


def test_nothing_is_overwritten(tmp_path):
    RunFolder.create(tmp_path / "run", Options())
    with pytest.raises(InputError, match="holds a run already; add --resume"):
        RunFolder.create(tmp_path / "run", Options())
    with pytest.raises(InputError, match="was begun with steps=3, now 4"):
        RunFolder.create(tmp_path / "run", Options(steps=4, resume=True), resume=True)
    RunFolder.create(tmp_path / "run", Options(resume=True), resume=True)
    (tmp_path / "file").write_text("mine")
    with pytest.raises(InputError, match="is a file"):
        RunFolder.create(tmp_path / "file", Options())
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("mine")
    for resume in (False, True):
        with pytest.raises(InputError, match="exists and is not a run folder"):
            RunFolder.create(tmp_path / "mine", Options(), resume=resume)
    assert (tmp_path / "mine" / "thesis.tex").read_text() == "mine"
    assert (tmp_path / "file").read_text() == "mine"


def test_unreadable_run_folders_are_named(tmp_path):
    with pytest.raises(InputError, match="is not a run folder"):
        RunFolder(tmp_path).config()
    (tmp_path / "config.yaml").write_text("a: [")
    with pytest.raises(InputError, match="not readable YAML"):
        RunFolder(tmp_path).config()
    (tmp_path / "config.yaml").write_text("- a")
    with pytest.raises(InputError, match="must hold a mapping"):
        RunFolder(tmp_path).config()


def test_command_line_goes_over_yaml_over_defaults(tmp_path):
    file = tmp_path / "o.yaml"
    file.write_text("steps: 7\nbudgets: [0.3, 0.9]\n")
    assert parse(Options, []) == Options()
    assert parse(Options, ["--config", str(file)]) == Options(7, (0.3, 0.9))
    assert parse(Options, ["--steps", "9", "--config", str(file), "--resume"]) == Options(9, (0.3, 0.9), True)
    RunFolder.create(tmp_path / "run", Options(steps=11))
    resumed = parse(Options, ["--resume", "--out", str(tmp_path / "run"), "--budgets", "0.5", "0.6"])
    assert resumed == Options(11, (0.5, 0.6), True, tmp_path / "run")


@pytest.mark.parametrize(
    ("content", "words"),
    [("stepz: 3", "unknown option 'stepz'; known: budgets"), ("[", "not readable YAML"), ("3", "must hold a mapping")],
)
def test_bad_yaml_is_named(tmp_path, content, words):
    file = tmp_path / "o.yaml"
    file.write_text(content)
    with pytest.raises(InputError, match=words):
        parse(Options, ["--config", str(file)])
    with pytest.raises(InputError, match="does not exist"):
        parse(Options, ["--config", str(tmp_path / "no.yaml")])
    with pytest.raises(InputError, match="needs the path"):
        parse(Options, ["--config"])


def test_checkpoints_appear_whole_and_the_newest_are_kept(tmp_path):
    for step in (10, 20, 30):
        save_checkpoint(tmp_path, step, {"w": torch.full((2,), float(step))}, {"step": step})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-000000020", "step-000000030"]
    tensors, state = load_checkpoint(tmp_path)
    assert state == {"step": 30} and tensors["w"].tolist() == [30, 30]
    (tmp_path / "unfinished").mkdir()  # what a kill in the middle of writing leaves
    assert load_checkpoint(tmp_path)[1] == {"step": 30}
    (tmp_path / "step-000000030" / "tensors.safetensors").write_bytes(b"torn")
    with pytest.raises(InputError, match="step-000000030' cannot be read"):
        load_checkpoint(tmp_path)
    assert load_checkpoint(tmp_path / "none") is None


def test_atomic_writing_replaces(tmp_path):
    write_atomically(tmp_path / "a", b"one")
    write_atomically(tmp_path / "a", b"two")
    assert (tmp_path / "a").read_bytes() == b"two" and len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize(
    ("budgets", "words"), [((), "no budget"), ((0.5, 0.0), "budget 0 is outside"), ((1.01,), "budget 1.01 is outside")]
)
def test_bad_budgets_are_named(budgets, words):
    with pytest.raises(InputError, match=words):
        check_budgets(budgets)
