"""Files of runs that were cut, or hold something else: named in one line; and places that cannot be written to."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import maskgym.eval.__main__ as eval_main
from maskgym import AdaptiveVLM
from maskgym.backbones import InputError, load_backbone
from maskgym.backbones.latency_model import LatencyModel
from maskgym.common.atomic import write_atomically
from maskgym.common.run_folder import RunFolder
from maskgym.eval.experiment.arms import Arm
from maskgym.eval.experiment.cells import MEASURED, Cell
from maskgym.eval.measure.report import plot_tradeoff
from maskgym.policies.controller.learned import SIZES, WEIGHTS, load_controller
from maskgym.policies.static.searched import SearchedOrder
from maskgym.training.checkpoints import load_checkpoint, save_checkpoint
from tests.conftest import command
from tests.refusals import Line, check_line, snapshot

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def backbone(desk):
    return load_backbone(str(desk["vlm"]))


@pytest.fixture
def run(desk, tmp_path):
    """A finished run of one's own, to be spoilt."""
    return Path(shutil.copytree(desk["run"], tmp_path / "run"))


def cut(file: Path, tenth: int) -> None:
    content = file.read_bytes()
    file.write_bytes(content[: len(content) * tenth // 10])


def edit(file: Path, **changes: object) -> None:
    """Change entries of a JSON file; those that become ``...`` are left out."""
    fields = {**json.loads(file.read_text(encoding="utf-8")), **changes}
    file.write_text(json.dumps({name: value for name, value in fields.items() if value is not ...}), encoding="utf-8")


def reweigh(file: Path, change) -> None:
    save_file(change(load_file(file)), file)


def refused(words: str, watched: Path, load, *arguments) -> None:
    before = snapshot(watched)
    with pytest.raises(InputError) as caught:
        load(*arguments)
    assert words in str(caught.value) and "\n" not in str(caught.value) and str(watched.name) in str(caught.value)
    assert snapshot(watched) == before


@pytest.mark.parametrize("tenth", range(10))
@pytest.mark.parametrize("name", [WEIGHTS, SIZES])
def test_controllers_cut_anywhere(name, tenth, run, backbone):
    cut(run / name, tenth)
    refused("no readable controller in", run, load_controller, run, backbone)


@pytest.mark.parametrize("tenth", range(10))
@pytest.mark.parametrize("name", ["tensors.safetensors", "state.json"])
def test_checkpoints_cut_anywhere(name, tenth, tmp_path):
    tensors = {"weight": torch.arange(64.0)}
    save_checkpoint(tmp_path / "run", 10, tensors, {"queries": 10})
    save_checkpoint(tmp_path / "run", 20, tensors, {"queries": 20})
    cut(tmp_path / "run" / "step-000000020" / name, tenth)
    refused("step-000000020' cannot be read", tmp_path / "run", load_checkpoint, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "step-000000020")  # the remedy
    loaded = load_checkpoint(tmp_path / "run")
    assert loaded is not None and loaded[1] == {"queries": 10}


def first(weights):
    return next(iter(weights))


SPOILT = {
    "another shape": (WEIGHTS, lambda w: {**w, first(w): torch.zeros(3)}, "do not fit controller.json"),
    "a name too many": (WEIGHTS, lambda w: {**w, "extra": torch.zeros(3)}, "do not fit controller.json"),
    "a name too few": (WEIGHTS, lambda w: {k: v for k, v in w.items() if k != first(w)}, "do not fit controller.json"),
    "other names": (WEIGHTS, lambda w: {f"module.{k}": v for k, v in w.items()}, "do not fit controller.json"),
    "no tensors": (WEIGHTS, lambda w: {}, "do not fit controller.json"),
    "integers": (WEIGHTS, lambda w: {k: v.long() for k, v in w.items()}, "torch.int64"),
    "booleans": (WEIGHTS, lambda w: {k: v.bool() for k, v in w.items()}, "torch.bool"),
    "not finite": (WEIGHTS, lambda w: {**w, first(w): w[first(w)] * float("nan")}, "not finite"),
    "sizes of another layout": (SIZES, {"tokens": 64}, "is for (tokens, layers, heads, hidden) = (64"),
    "sizes of another kind": (SIZES, {"kind": "three-level"}, "no readable controller"),
    "kind of a number": (SIZES, {"kind": 3}, "no readable controller"),
    "kind of a list": (SIZES, {"kind": []}, "no readable controller"),
    "a size too many": (SIZES, {"depth": 3}, "no readable controller"),
    "a size too few": (SIZES, {"hidden": ...}, "no readable controller"),
    "a size of text": (SIZES, {"width": "wide"}, "no readable controller"),
    "a size below zero": (SIZES, {"width": -1}, "no readable controller"),
    "a size of a fraction": (SIZES, {"pools": 1.5}, "no readable controller"),
    "a width beyond memory": (SIZES, {"width": 10**13}, "do not fit controller.json"),
    "a spread of text": (SIZES, {"initial_spread": "far"}, "do not fit controller.json"),
    "an unknown rule": (SIZES, {"rule": "all"}, "rule is 'all'"),
    "axes of a number": (SIZES, {"axes": 3}, "no readable controller"),
    "other weights' fingerprint": (SIZES, {"backbone_fingerprint": "0" * 32}, "was trained for other weights"),
}


@pytest.mark.parametrize("name", SPOILT)
def test_spoilt_controllers(name, run, backbone):
    file, change, words = SPOILT[name]
    if file == WEIGHTS:
        reweigh(run / file, change)
    else:
        edit(run / file, **change)
    refused(words, run, load_controller, run, backbone)


@pytest.mark.parametrize("content", ["[]", "3", '"text"', "null", "", "[" * 100_000, "{", '{"kind": "two-level"}'])
def test_sizes_that_are_no_object(content, run, backbone):
    (run / SIZES).write_text(content)
    refused("no readable controller", run, load_controller, run, backbone)


@pytest.fixture(scope="module")
def saved(desk, backbone, tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved") / "mine"
    AdaptiveVLM.from_pretrained(desk["run"]).save_pretrained(folder)  # with its VLM
    return folder


DESCRIPTIONS = {
    "no backbone": {"backbone": ...},
    "no options": {"backbone_options": ...},
    "options of a list": {"backbone_options": [1]},
    "options of a text": {"backbone_options": "heads"},
    "an unknown option": {"backbone_options": {"hands": 4}},
    "heads of text": {"backbone_options": {"heads": "four"}},
    "heads that do not fit": {"backbone_options": {"heads": 3}},
    "a backbone of a number": {"backbone": 3},
    "a backbone that is nowhere": {"backbone": "/nowhere"},
    "a protected layer of text": {"backbone_options": {"protected_layers": "first"}},
}


@pytest.mark.parametrize("name", DESCRIPTIONS)
def test_spoilt_descriptions(name, saved, tmp_path):
    mine = Path(shutil.copytree(saved, tmp_path / "mine"))
    edit(mine / "adaptive.json", **DESCRIPTIONS[name])
    with pytest.raises(InputError) as caught:
        AdaptiveVLM.from_pretrained(mine)
    assert "\n" not in str(caught.value)


def test_a_model_that_is_gone_is_named(saved, tmp_path):
    mine = Path(shutil.copytree(saved, tmp_path / "mine"))
    assert AdaptiveVLM.from_pretrained(mine).name == "mine"
    shutil.rmtree(mine / "model")
    refused("mine/model' could not be read (there is no such folder)", mine, AdaptiveVLM.from_pretrained, mine)


@pytest.mark.parametrize("tenth", range(10))
def test_descriptions_cut_anywhere(tenth, saved, tmp_path):
    mine = Path(shutil.copytree(saved, tmp_path / "mine"))
    cut(mine / "adaptive.json", tenth)
    refused("adaptive.json' is not readable", mine, AdaptiveVLM.from_pretrained, mine)


@pytest.mark.parametrize("content", ["{}", "[3]", "[", "3", "\udce9"])
def test_records_that_are_none(content, saved, tmp_path):
    mine = Path(shutil.copytree(saved, tmp_path / "mine"))
    (mine / "result.json").write_bytes(content.encode("utf-8", "surrogateescape"))
    refused("result.json'", mine, AdaptiveVLM.from_pretrained, mine)


@pytest.mark.parametrize("content", ["", "- 1", "seed: [", "\0", "3", "[" * 100_000])
def test_configs_of_runs(content, run):
    (run / "config.yaml").write_text(content)
    refused("config.yaml", run, RunFolder(run).backbone)


@pytest.mark.parametrize("content", ["{\n", "3\n", '{"queries": 1}\n[]\n', "\0\n", "[" * 100_000 + "\n"])
def test_metrics_that_are_none(content, run):
    (run / "metrics.jsonl").write_text(content)
    refused("metrics.jsonl', line", run, RunFolder(run).metrics)


LINES = {
    "queries of text": ('{"queries": "8", "reward": 0.5}', "has queries: '8', not a number"),
    "queries of a list": ('{"queries": [8]}', "has queries: [8], not a number"),
    "queries of true": ('{"queries": true}', "has queries: True, not a number"),
    "queries beyond all": ('{"queries": 1%s}' % ("0" * 400), "has queries: 1000"),
    "no queries beside a reward": ('{"reward": 0.5}', "lacks 'queries'"),
    "no queries beside a validation": ('{"validation": {"0.5": {"accuracy": 1}}}', "lacks 'queries'"),
    "a reward of none": ('{"queries": 8, "reward": null}', "has reward: None, not a number"),
    "a validation of a number": ('{"queries": 8, "validation": 0.5}', "has validation: 0.5, not accuracies by budget"),
    "a validation of nothing": ('{"queries": 8, "validation": {}}', "has validation: {}, not accuracies"),
    "a validation of numbers": ('{"queries": 8, "validation": {"0.5": 1}}', "has validation: {'0.5': 1}"),
    "a validation of no accuracy": ('{"queries": 8, "validation": {"0.5": {}}}', "has validation: {'0.5': {}}"),
    "an accuracy of text": ('{"queries": 8, "validation": {"0.5": {"accuracy": "1"}}}', "has validation: {'0.5'"),
    "a step of text": ('{"step": "8"}', "has step: '8', not a number"),
}


@pytest.mark.parametrize("name", LINES)
def test_metrics_that_lack_numbers(name, run):
    line, words = LINES[name]
    (run / "metrics.jsonl").write_text(f'{{"queries": 4}}\n{line}\n')
    refused(f"metrics.jsonl', line 2, {words}", run, RunFolder(run).metrics)


TIMING = {
    "no seconds": ('{"queries": 8, "peak_memory_mb": 1}', "lacks 'seconds'"),
    "no queries": ('{"seconds": 8, "peak_memory_mb": 1}', "lacks 'queries'"),
    "no memory": ('{"queries": 8, "seconds": 8}', "lacks 'peak_memory_mb'"),
    "seconds of text": ('{"queries": 8, "seconds": "8", "peak_memory_mb": 1}', "has seconds: '8', not a number"),
    "updates of text": (
        '{"queries": 8, "seconds": 8, "update_seconds": "8", "peak_memory_mb": 1}',
        "has update_seconds: '8', not a number",
    ),
    "memory of none": ('{"queries": 8, "seconds": 8, "peak_memory_mb": null}', "has peak_memory_mb: None"),
}


@pytest.mark.parametrize("name", TIMING)
def test_timing_that_lacks_numbers(name, run):
    line, words = TIMING[name]
    (run / "timing.jsonl").write_text(f"{line}\n")
    refused(f"timing.jsonl', line 1, {words}", run, RunFolder(run).timing)


RECORD = {**dict.fromkeys(MEASURED, 0.5), "n": 2, "budgeted": True, "policy": "full", "arm": "full", "seed": 0}


@pytest.mark.parametrize("value", ["0.5", None, [], {}, True, 10**400])
@pytest.mark.parametrize("field", ["accuracy", "budget", "n", "ttft_ms_p50"])
def test_records_that_hold_something_else_than_numbers(field, value, saved, tmp_path):
    mine = Path(shutil.copytree(saved, tmp_path / "mine"))
    (mine / "result.json").write_text(json.dumps([RECORD, {**RECORD, field: value}]))
    words = f"result.json', record 2: {field} is {value!r:.40}; it must be a number"
    refused(words, mine, AdaptiveVLM.from_pretrained, mine)


CELLS = {
    **{f"no {field}": ({**RECORD, field: ...}, f"{field} is None, not a finite number") for field in MEASURED},
    "an accuracy that is not finite": ({**RECORD, "accuracy": float("nan")}, "accuracy is nan, not a finite number"),
    "no word on budgets": ({**RECORD, "budgeted": ...}, "budgeted is None, not true or false"),
    "a number on budgets": ({**RECORD, "budgeted": 1}, "budgeted is 1, not true or false"),
    "a gap of a number": ({"budget": 0.5, "gap": 3}, "gap is 3, not a text"),
    "a gap nowhere": ({"gap": "too little"}, "budget is None, not a finite number"),
}


@pytest.fixture(scope="module")
def measured(desk):
    """A small experiment that is done, with a training that it is said to have had."""
    out = desk["place"] / "measured"
    with pytest.MonkeyPatch.context() as patch:
        command(patch, eval_main.main, *EXPERIMENT.format(**desk, out=out).split()[1:])
    run = out / "cells" / "full" / "seed-0" / "run"
    run.mkdir()
    (run / "metrics.jsonl").write_text('{"queries": 8, "validation": {"0.7": {"accuracy": 0.5}}}\n')
    (run / "timing.jsonl").write_text('{"queries": 8, "seconds": 1.5, "peak_memory_mb": 9}\n')
    return out


EXPERIMENT = (
    "eval experiment training --backbone {vlm} --data {data} --out {out} --arms full random --budgets 0.7 1 --seeds 0"
)


@pytest.fixture
def spoilt(measured, desk, tmp_path, monkeypatch, capsys):
    """Spoils a file of a cell, and tells what the report then says of it."""

    def spoil(name: str, content: bytes, words: str) -> None:
        out = Path(shutil.copytree(measured, tmp_path / "out"))
        (out / "cells" / "full" / "seed-0" / name).write_bytes(content)
        check_line(Line(EXPERIMENT, words), monkeypatch, capsys, out, {**desk, "out": out})

    return spoil


def test_an_experiment_that_is_whole_is_reported(measured, desk, monkeypatch, capsys):
    """The null of the tests below."""
    command(monkeypatch, eval_main.main, *EXPERIMENT.format(**desk, out=measured).split()[1:])
    assert "queries to converge" in capsys.readouterr().out


@pytest.mark.parametrize("name", CELLS)
def test_the_report_names_a_record_that_lacks_something(name, spoilt):
    record, words = CELLS[name]
    record = {field: value for field, value in record.items() if value is not ...}
    spoilt("records.json", json.dumps([record]).encode(), f"seed-0/records.json', record 1: {words}; remove the file")


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("records.json", b"[3]", "must hold a list of records"),
        ("records.json", json.dumps([{**RECORD, "budgeted": False}] * 2).encode(), "has one record, not 2"),
        ("records.json", json.dumps([{**RECORD, "n": 3}]).encode(), "outcomes.npz' cannot be read (accuracy at 0.5"),
        ("outcomes.npz", b"", "outcomes.npz' cannot be read"),
        ("run/metrics.jsonl", b'{"queries": 8, "validation": {"0.7": 1}}\n', "metrics.jsonl', line 1, has validation"),
        ("run/timing.jsonl", b'{"queries": 8}\n', "timing.jsonl', line 1, lacks 'seconds'"),
    ],
)
def test_the_report_names_a_file_that_cannot_be_used(name, content, words, spoilt):
    spoilt(name, content, words)


def test_texts_of_cells_are_taken_whatever_they_are(tmp_path):
    cell = Cell(Arm("full"), 0, tmp_path)
    (tmp_path / "run").mkdir()
    (tmp_path / "failure.txt").write_bytes(b"\xff\x1b[31mred\n" + b"x" * 10**6)
    (tmp_path / "run" / "command.txt").write_bytes(b"\xff --out 'a  b'\n")
    said = cell.failure()
    assert said is not None and said.startswith("\ufffd\\x1b[31mred x") and len(said) < 11_000
    assert cell.command() == "\ufffd --out 'a  b'"


@pytest.mark.parametrize("kind", [SearchedOrder, LatencyModel])
@pytest.mark.parametrize("tenth", range(10))
def test_plans_and_latency_models_cut_anywhere(kind, tenth, desk, tmp_path):
    whole = desk["desk"] / ("plan.json" if kind is SearchedOrder else "latency.json")
    mine = Path(shutil.copy(whole, tmp_path / "mine.json"))
    assert kind.load(mine)
    cut(mine, tenth)
    with pytest.raises(InputError, match=r"no readable (plan|latency model) in .*mine.json"):
        kind.load(mine)


RESUMED = "train_rl --backbone {vlm} --data {data} --out {spoilt} --resume --total-queries 4 --width 8"
RUNS = [
    Line(f"eval run {{no_weights}} {'--backbone {vlm} --data {data}'}", "no readable controller"),
    Line("eval run {no_backbone} --data {data}", "could not be read"),
    Line("eval run {run} {no_backbone} --data {data}", "the controllers are for different backbones"),
    Line("eval run {run} --data {data} --backbone tiny", "backbone 'tiny' has"),
    Line(RESUMED, "was begun with width=48, now 8"),
    Line("train_rl --resume --out {unknown_option}", "unknown option 'colour'"),
    Line("train_rl --resume --out {wrong_type}", "has width: 'wide'"),
    Line("train_gumbel --resume --out {run}", "unknown option"),
    Line("train_rl --resume --out {other_tensors}", "does not fit this run"),
    Line("train_rl --resume --out {no_state}", "does not fit this run"),
]


@pytest.fixture(scope="module")
def runs(desk):
    """Runs of other versions, and spoilt ones."""
    folder = desk["place"] / "runs"
    folder.mkdir()
    places = {
        name: Path(shutil.copytree(desk["run"], folder / name))
        for name in ("no_weights", "no_backbone", "spoilt", "unknown_option", "wrong_type", "other_tensors", "no_state")
    }
    (places["no_weights"] / WEIGHTS).unlink()
    config = desk["run"] / "config.yaml"
    for name, old, new in (
        ("no_backbone", str(desk["vlm"]), "/nowhere"),
        ("unknown_option", "width: 48", "colour: red"),
        ("wrong_type", "width: 48", "width: wide"),
    ):
        assert old in config.read_text()
        (places[name] / "config.yaml").write_text(config.read_text().replace(old, new))
    save_checkpoint(places["other_tensors"] / "checkpoints", 4, {"policy.x": torch.zeros(1)}, {"queries": 4})
    save_checkpoint(places["no_state"] / "checkpoints", 4, {"policy.x": torch.zeros(1)}, {})
    return {**desk, **places}


@pytest.mark.parametrize("line", RUNS, ids=lambda line: line.command)
@pytest.mark.filterwarnings("ignore:You have specified a mini-batch size")
def test_spoilt_runs(line, monkeypatch, capsys, runs):
    check_line(line, monkeypatch, capsys, runs["place"], runs)


WRITERS = {
    "records": lambda path: write_atomically(path, b"[]"),
    "a plot": lambda path: plot_tradeoff(
        [
            {
                "policy": "full",
                "backbone": "b",
                "data": "d",
                "split": "s",
                "n": 1,
                "accuracy": 1.0,
                "accuracy_stderr": 0.0,
                "llm_flops_ratio": 1.0,
            }
        ],
        path,
    ),
    "a plan": lambda path: SearchedOrder("b", (1, 1, 1), "d", "s", 1, [[0]], [1], [0]).save(path),
    "a latency model": lambda path: LatencyModel("d", "b", (0, 0, 0, 0, 0), 0).save(path),
}


@pytest.mark.parametrize("writer", WRITERS)
@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_a_full_disk_is_named_and_devices_stay_what_they_are(writer, tmp_path):
    full = tmp_path / "full.json"
    full.symlink_to("/dev/full")
    with pytest.raises(InputError, match=r"full.json' cannot be written \(No space left on device\); make room"):
        WRITERS[writer](full)
    assert [path.name for path in tmp_path.iterdir()] == ["full.json"] and full.is_symlink()


@pytest.mark.parametrize("writer", WRITERS)
def test_a_folder_that_is_gone_is_named(writer, tmp_path):
    with pytest.raises(InputError, match=r"gone/a.json' cannot be written \(No such file or directory\)"):
        WRITERS[writer](tmp_path / "gone" / "a.json")
    assert not list(tmp_path.iterdir())
