"""SIGINT and SIGTERM: a checkpoint at the next safe point, one line, the right status; and then exactly on."""

import json
import os
import signal
import subprocess
import sys
import threading
import time

import pytest
import torch
from safetensors.torch import load_file

import maskgym.eval.__main__ as eval_main
import maskgym.training.backbone as train_backbone
import maskgym.training.rl as train_rl
from maskgym.common.stopping import Stopped, StopSignals, run_process
from maskgym.eval import cli
from maskgym.eval.experiment import arms, jobs
from maskgym.eval.experiment.arms import Arm, relaxed
from maskgym.eval.experiment.cells import Cell
from tests.conftest import command
from tests.test_train_backbone import OPTIONS as BACKBONE_OPTIONS
from tests.test_train_rl import OPTIONS
from tests.waiting import doing, dying, prepared, waiting

pytestmark = pytest.mark.slow

BOTH = pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])


def signalled(function, number, when):
    """A function that sends this process a signal before the call for which ``when`` holds."""

    def wrapped(self, *arguments, **named):
        if when(self):
            os.kill(os.getpid(), number)
        return function(self, *arguments, **named)

    return wrapped


def stopped_line(capsys):
    """The last line on standard error, which has no traceback."""
    error = capsys.readouterr().err
    assert "Traceback" not in error
    return error.strip().splitlines()[-1]


def test_a_training_stops_between_updates_and_goes_on_exactly(monkeypatch, place, tmp_path, capsys):
    where = ["--backbone", place / "vlm", "--data", place / "data", *OPTIONS.split(), "--total-queries", 12]
    command(monkeypatch, train_rl.main, *where, "--out", tmp_path / "whole")
    before = [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)]
    step = signalled(train_rl.RunCallback._on_step, signal.SIGINT, lambda self: self.num_timesteps == 8)
    with monkeypatch.context() as patch, pytest.raises(SystemExit) as caught:
        patch.setattr(train_rl.RunCallback, "_on_step", step)
        patch.setattr(sys, "argv", ["train_rl.py", *map(str, where), "--out", str(tmp_path / "stopped")])
        cli.run(train_rl.main, cli.RESUME)
    assert caught.value.code == 130
    assert stopped_line(capsys) == "stopped by SIGINT; go on with the same command and --resume"
    assert [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)] == before
    checkpoints = sorted(path.name for path in (tmp_path / "stopped" / "checkpoints").iterdir())
    assert checkpoints == ["step-000000000", "step-000000004"], "after the update that was going on; none was due"
    command(monkeypatch, train_rl.main, *where, "--out", tmp_path / "stopped", "--resume")
    whole, stopped = (load_file(tmp_path / name / "controller.safetensors") for name in ("whole", "stopped"))
    assert all(torch.equal(whole[name], stopped[name]) for name in whole)
    assert (tmp_path / "whole/metrics.jsonl").read_text() == (tmp_path / "stopped/metrics.jsonl").read_text()


def test_a_backbone_training_stops_after_a_step_and_goes_on_exactly(monkeypatch, place, tmp_path):
    """Within a line of metrics: what it averages is not forgotten."""
    where = ["--data", place / "data", *BACKBONE_OPTIONS.split(), "--validate-every", 3, "--vision-steps", 1]
    command(monkeypatch, train_backbone.main, *where, "--out", tmp_path / "whole")
    losses = train_backbone.ElasticTrainer.compute_loss
    stopping = signalled(losses, signal.SIGTERM, lambda self: self.state.global_step == 3)
    with monkeypatch.context() as patch, pytest.raises(SystemExit) as caught:
        patch.setattr(train_backbone.ElasticTrainer, "compute_loss", stopping)
        command(patch, train_backbone.main, *where, "--out", tmp_path / "stopped")
    assert caught.value.code == 143
    checkpoints = tmp_path / "stopped" / "checkpoints"
    assert {path.name for path in checkpoints.glob("checkpoint-*")} == {"checkpoint-3", "checkpoint-4"}
    assert not (tmp_path / "stopped" / "model").exists()
    command(monkeypatch, train_backbone.main, *where, "--out", tmp_path / "stopped", "--resume")
    whole, stopped = (load_file(tmp_path / name / "model" / "model.safetensors") for name in ("whole", "stopped"))
    assert all(torch.equal(whole[name], stopped[name]) for name in whole)
    logged = [
        [{**json.loads(line), "seconds": 0} for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        for name in ("whole", "stopped")
    ]
    assert logged[0] == logged[1] and len(logged[0]) == 3


WAITS = """
import signal, sys, time
from maskgym.common.stopping import Stopped, StopSignals
print("here", flush=True)
with StopSignals(waits=True) as signals:
    print("ready", flush=True)
    time.sleep(60)
"""


@BOTH
def test_a_second_signal_ends_at_once(number, status):
    """The null: the first does not."""
    process = subprocess.Popen([sys.executable, "-c", WAITS], stdout=subprocess.PIPE)
    assert [process.stdout.readline(), process.stdout.readline()] == [b"here\n", b"ready\n"]
    process.send_signal(number)
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(0.3)
    process.send_signal(number)
    assert process.wait(5) == -number and status == 128 + number
    process.stdout.close()


def test_where_nothing_waits_a_signal_is_obeyed_at_once(monkeypatch, capsys):
    def main():
        os.kill(os.getpid(), signal.SIGINT)
        raise AssertionError("not reached")

    with pytest.raises(SystemExit) as caught:
        cli.run(main)
    assert caught.value.code == 130 and stopped_line(capsys) == "stopped by SIGINT; begin anew"


def test_a_signal_that_nobody_looked_for_is_obeyed_at_the_end():
    with pytest.raises(Stopped, match="SIGTERM"), StopSignals(), StopSignals(waits=True) as signals:
        os.kill(os.getpid(), signal.SIGTERM)
        assert signals.asked == signal.SIGTERM


def test_other_threads_are_left_alone():
    """Python has signals in the main thread only; elsewhere installing a handler would raise."""
    ended = []

    def work():
        with StopSignals():
            ended.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert ended == [signal.getsignal(signal.SIGTERM)]


CHILD = """
import signal, sys, time
def stop(number, frame):
    print(number, file=sys.stderr)
    raise SystemExit(128 + number)
signal.signal(signal.SIGTERM, stop)
open(sys.argv[1], "w").close()
time.sleep(60)
"""


def when_there(path, act):
    """Do something as soon as a file is there."""

    def wait():
        while not path.exists():
            time.sleep(0.01)
        act()

    thread = threading.Thread(target=wait)
    thread.start()
    return thread


def test_a_process_that_is_waited_for_hears_the_signal_and_ends(tmp_path):
    """Else it would go on without anybody to wait for it."""
    thread = when_there(tmp_path / "ready", lambda: os.kill(os.getpid(), signal.SIGTERM))
    began = time.monotonic()
    with pytest.raises(Stopped), StopSignals():
        run_process([sys.executable, "-c", CHILD, str(tmp_path / "ready")])
    assert time.monotonic() - began < 30
    thread.join()
    done = run_process([sys.executable, "-c", "import sys; sys.exit('words')"])
    assert done.returncode == 1 and done.stderr == b"words\n"


def test_a_process_that_is_just_started_hears_the_signal_too(monkeypatch):
    """One that comes before anybody could pass it on; it would be waited for to its end."""
    start, started = subprocess.Popen, []

    def signalled_start(*arguments, **named):
        started.append(start(*arguments, **named))
        os.kill(os.getpid(), signal.SIGTERM)
        return started[0]

    monkeypatch.setattr("maskgym.common.stopping.subprocess.Popen", signalled_start)
    began = time.monotonic()
    with pytest.raises(Stopped), StopSignals():
        run_process([sys.executable, "-c", "import time; time.sleep(60)"])
    assert time.monotonic() - began < 30 and started[0].poll() == -signal.SIGTERM


def test_an_experiment_passes_the_signal_on(monkeypatch, place, tmp_path, capsys):
    """The training that was going on has saved a checkpoint that was not due; what was done before is kept, and nothing
    is marked as failed."""
    run = tmp_path / "out" / "cells" / "gumbel" / "seed-0" / "run"
    thread = when_there(run / "checkpoints" / "step-000000000", lambda: os.kill(os.getpid(), signal.SIGTERM))
    row = relaxed("gumbel", "gumbel", "--batch-size", "8", "--width", "8")
    monkeypatch.setitem(arms.EXPERIMENTS, "training", lambda prepared: [arms.FULL, row])
    where = ["--backbone", place / "vlm", "--data", place / "data", "--out", tmp_path / "out"]
    options = ["--budgets", 0.6, 1, "--total-queries", 96, "--seeds", 0, "--tuning-queries", 1]
    with pytest.raises(SystemExit) as caught:
        command(monkeypatch, eval_main.main, "experiment", "training", *where, *options)
    thread.join()
    assert caught.value.code == 143 and stopped_line(capsys).startswith("stopped by SIGTERM; ")
    assert not (run / "result.json").exists() and not (run.parent / "failure.txt").exists()
    assert max(int(path.name.split("-")[1]) for path in (run / "checkpoints").glob("step-*")) > 0
    assert (tmp_path / "out" / "cells" / "full" / "seed-0" / "records.json").exists()


def test_jobs_side_by_side_end_together(tmp_path):
    """The two that work are stopped, and the two that wait are not begun."""
    cells = [Cell(Arm("full", "full"), seed, tmp_path) for seed in range(4)]
    thread = when_there(tmp_path / "begun-1", lambda: os.kill(os.getpid(), signal.SIGINT))
    with pytest.raises(Stopped), StopSignals():
        list(jobs.side_by_side(cells, 2, prepared, waiting))
    thread.join()
    assert {path.name for path in tmp_path.iterdir()} == {"begun-0", "begun-1"}


def test_a_job_that_is_killed_is_told_in_one_line(tmp_path, capsys):
    """What is done is kept, and the same call goes on."""
    cells = [Cell(Arm("full", "full"), seed, tmp_path) for seed in range(3)]
    done = []

    def main():
        done.extend(jobs.side_by_side(cells, 2, prepared, dying))

    with pytest.raises(SystemExit) as caught:
        cli.run(main)
    line = stopped_line(capsys)
    assert caught.value.code == 2 and line.startswith("error: a process of --jobs 2 was killed, for want of memory,")
    assert line.endswith("go on with the same command, perhaps with fewer --jobs")
    assert done == cells[:1] and (tmp_path / "done-0").exists()
    assert {cell.seed for cell in jobs.side_by_side(cells[1:], 2, prepared, doing)} == {1, 2}
