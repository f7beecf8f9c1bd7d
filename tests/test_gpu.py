"""Every step of ``eval gpu`` on a narrow model of the same layout, on a device that refuses what CUDA refuses."""

import json
import time
from functools import partial

import pytest
import torch

from maskgym.backbones import load_backbone
from maskgym.eval import __main__ as command_line
from maskgym.eval.bench import engine as bench_engine
from maskgym.eval.bench.first_token import first_token_figures
from maskgym.eval.bench.gpu import STEPS, Machine, Step, measure, nvidia_smi, table
from maskgym.eval.bench.launches import counted
from maskgym.eval.bench.table import bench_environment
from maskgym.eval.bench.trainings import gumbel_speed
from tests.conftest import command
from tests.fake_cuda import fake_cuda

VISION = {
    "image_size": 56,
    "num_hidden_layers": 1,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_attention_heads": 2,
}
TEXT = {"vocab_size": 64, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4, "num_attention_heads": 4}


def narrow(device="cuda"):
    return Machine(device, VISION, TEXT)


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """Of all steps, each repeated as little as can be."""
    with fake_cuda():
        once = {name: Step(0.0, step.measure) for name, step in STEPS.items()}
        return measure(narrow(), tmp_path_factory.mktemp("gpu") / "new", 600, once)


@pytest.mark.slow
@pytest.mark.parametrize("step", STEPS)
def test_every_step_runs_on_cuda(results, step):
    assert results[step].get("error") is None and results[step]["figures"]
    for row in results[step]["figures"] if isinstance(results[step]["figures"], list) else [results[step]["figures"]]:
        assert all(value >= 0 for value in row.values() if not isinstance(value, str)), row


def test_clocks_are_read_where_there_are_some(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert nvidia_smi("clocks.sm", "clocks.mem") == {}
    (tmp_path / "nvidia-smi").write_text("#!/bin/sh\necho 1980, 3201\n")
    (tmp_path / "nvidia-smi").chmod(0o755)
    assert nvidia_smi("clocks.sm", "clocks.mem") == {"clocks.sm": "1980", "clocks.mem": "3201"}


@pytest.mark.slow
def test_execution_is_exact_as_far_as_the_type_goes(results):
    rows = {(row["model"], row["type"]): row for row in results["exact"]["figures"]}
    for model in ("7B width, 3 layers", "tiny"):
        assert max(value for name, value in rows[model, "float32"].items() if "_vs_" in name) < 1e-5
        half = rows[model, "bfloat16"]
        assert half["hf_vs_float32"] > 1e-4 and half["plans_vs_gates"] < 5 * half["hf_vs_float32"]


@pytest.mark.slow
@pytest.mark.parametrize("part", ["_by_axis", "_mixed_batch", "_decoding"])
def test_the_engine_bench_runs_on_cuda(part):
    with fake_cuda():
        assert all(value > 0 for _, value in getattr(bench_engine, part)(narrow().open, 1))


@pytest.mark.slow
def test_the_other_benches_run_on_cuda(place):
    with fake_cuda():
        assert all(value > 0 for _, value in first_token_figures(narrow().open, repeats=1, keep=4))
        figures = bench_environment(load_backbone("tiny", device="cuda"), str(place / "data"), rows=4, repeats=1)
        assert all(figure["value"] > 0 for figure in figures)


@pytest.mark.slow
def test_plans_spend_what_they_are_named_for(results):
    for step in ("prefill", "tokens"):
        rows = {row["plan"]: row for row in results[step]["figures"]}
        assert len(rows) == 2 + 4 * 4 and rows["full"]["over_full"] == rows["hf"]["over_hf"] == 1
        for name, row in rows.items():
            if name.startswith(("heads", "layers")):  # 16 visual tokens are little beside the text
                assert row["share"] == pytest.approx(float(name.split()[1]) / 100, abs=0.13), name
                assert row["speedup_over_cut"] == pytest.approx(row["share"] / row["over_full"])


def test_a_step_that_fails_does_not_end_the_others(tmp_path):
    def fails(machine, seconds):
        raise ValueError("no kernel")

    steps = {"bad": Step(0.5, fails), "good": Step(0.5, lambda machine, seconds: {"seconds": seconds})}
    results = measure(narrow("cpu"), tmp_path, 60, steps)
    assert results["bad"]["error"] == "ValueError: no kernel" and "fails" in " ".join(results["bad"]["traceback"])
    assert 25 < results["good"]["figures"]["seconds"] < 30
    assert json.loads((tmp_path / "good.json").read_text()) == results["good"]
    assert "ValueError: no kernel" in table(results)


def test_what_was_measured_is_not_repeated(tmp_path):
    calls = []
    steps = {"one": Step(0.5, lambda machine, seconds: calls.append("one") or [{"value": 1}])}
    first = measure(narrow("cpu"), tmp_path, 60, steps)
    assert measure(narrow("cpu"), tmp_path, 60, steps) == first and calls == ["one"]
    (tmp_path / "one.json").write_text('{"error": "once"}')
    assert "figures" in measure(narrow("cpu"), tmp_path, 60, steps)["one"] and calls == ["one", "one"]


@pytest.mark.slow
def test_time_ends_steps_and_leaves_others_out(tmp_path):
    step = Step(0.5, lambda machine, seconds: time.sleep(60))
    results = measure(narrow("cpu"), tmp_path, 3.2, {"endless": step, "late": step})
    assert "did not return within 3" in results["endless"]["error"] and "0 s were left" in results["late"]["skipped"]


@pytest.mark.slow
def test_smaller_batches_where_memory_ends(monkeypatch):
    tried = []

    def speed(backbone, seconds, rows):
        tried.append(rows)
        if rows > 2:
            raise torch.OutOfMemoryError
        return {"rows": rows}

    monkeypatch.setattr("maskgym.eval.bench.trainings._gumbel_speed", speed)
    assert gumbel_speed(None, 0.0) == {"rows": 2} and tried == [8, 4, 2]
    with pytest.raises(torch.OutOfMemoryError):
        gumbel_speed(None, 0.0, (8, 4))


def test_launches_are_told_by_their_names():
    events = [
        ("cudaLaunchKernel", False),
        ("ampere_bf16_s16816gemm", True),
        ("void at::native::elementwise_kernel", True),
        ("cudaMemcpyAsync", False),
        ("Memcpy HtoD (Pageable -> Device)", True),
        ("Memcpy DtoH (Device -> Pageable)", True),
        ("Memcpy DtoD (Device -> Device)", True),
        ("Memset (Device)", True),
        ("cudaStreamSynchronize", False),
        ("cudaDeviceSynchronize", False),
    ]
    assert counted(events) == {"kernels": 2, "syncs": 2, "copies_to_device": 1, "copies_to_host": 1}


def test_the_command_prints_its_table_and_keeps_it(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr("maskgym.eval.bench.gpu.LEAST", 1e9)
    command(monkeypatch, command_line.main, "gpu", "--device", "cpu", "--out", tmp_path / "new")
    printed = capsys.readouterr().out
    assert "| gumbel " in printed and "skipped" in printed and (tmp_path / "new" / "table.md").read_text() == printed


@pytest.mark.parametrize(
    ("options", "problem"),
    [(["--seconds", "0"], "--seconds is 0"), ([], "there is no CUDA"), (["--out", "{file}/x"], "is a file")],
)
def test_bad_options(monkeypatch, capsys, tmp_path, options, problem):
    (tmp_path / "file").touch()
    options = [option.format(file=tmp_path / "file") for option in options]
    if "--out" in options:
        options += ["--device", "cpu"]
    with pytest.raises(SystemExit) as ended:
        command(monkeypatch, command_line.main, "gpu", *options)
    assert ended.value.code == 2 and problem in capsys.readouterr().err


def test_a_fake_device_refuses_what_cuda_refuses():
    with fake_cuda():
        there = torch.ones(3, device="cuda")
        assert there.device.type == "cuda" and (there + 1).is_cuda and not there.cpu().is_cuda
        for refused, words in (
            (partial(torch.add, there, torch.ones(3)), "same device"),
            (there.numpy, "numpy"),
            (partial(torch.Tensor.__getitem__, torch.ones(3), there.long()), "indices"),
        ):
            with pytest.raises((RuntimeError, TypeError), match=words):
                refused()
        assert torch.nn.Linear(3, 3).to("cuda")(there).is_cuda
        with torch.device("cuda"):
            assert torch.nn.Linear(3, 3).weight.is_cuda
    assert not torch.ones(3).is_cuda
