"""Killed at any moment, a run loses nothing that was saved: every file-system operation is a place to die."""

import errno
import json
import os
import random
import resource
import shutil
import signal
import sys
from contextlib import contextmanager

import pytest
import torch
from safetensors.torch import load_file, save_file

import maskgym.training.backbone as train_backbone
import maskgym.training.gumbel as train_gumbel
import maskgym.training.rl as train_rl
from maskgym.backbones import InputError
from maskgym.common.atomic import whole_folder, write_atomically
from maskgym.common.run_folder import RunFolder
from maskgym.eval import cli
from maskgym.training.checkpoints import load_checkpoint, save_checkpoint
from tests.conftest import command
from tests.kill_and_resume import killed, make_place, unkilled, warm_up
from tests.test_runs import Options
from tests.test_train_backbone import OPTIONS as BACKBONE_OPTIONS
from tests.test_train_rl import OPTIONS

pytestmark = pytest.mark.slow

OPERATIONS = ("open", "os.rename", "os.remove", "os.rmdir", "os.mkdir")
"""What Python tells its audit hooks of changes to the disk."""


class Crash(BaseException):
    pass


class Heard:
    """Operations under a folder, while it is set; the one whose number is ``deadly`` is not carried out."""

    folder = ""
    deadly = -1
    operations = ()


def _hear(event, arguments):
    if not Heard.folder or event not in OPERATIONS or not str(arguments[0]).startswith(Heard.folder):
        return
    if event == "open" and not arguments[2] & (os.O_WRONLY | os.O_RDWR):
        return
    if len(Heard.operations) == Heard.deadly:
        raise Crash
    Heard.operations.append((event, str(arguments[0])))


sys.addaudithook(_hear)


@contextmanager
def crashing(folder, deadly=-1):
    Heard.folder, Heard.deadly, Heard.operations = str(folder), deadly, []
    try:
        yield Heard.operations
    finally:
        Heard.folder = ""


def crash_everywhere(tmp_path, prepare, change, check):
    """Die before the first, the second, ... operation of a change; what is half written is then torn as well. Returns
    for each place what ``check`` found, and at last what it found after the whole change."""
    found = []
    while True:
        deadly = len(found)
        folder = tmp_path / str(deadly)
        folder.mkdir()
        prepare(folder)
        try:
            with crashing(folder, deadly) as operations:
                change(folder)
        except Crash:
            for path in folder.rglob("*"):
                if path.is_file() and (path.suffix == ".tmp" or ".unfinished" in str(path)):
                    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
            found.append(check(folder))
            change(folder)  # what is left over is in nobody's way
            assert check(folder) == "new"
            assert not [path for path in folder.rglob("*") if path.suffix == ".tmp" or path.name == ".unfinished"]
        else:
            assert len(operations) == deadly, "every operation was a place to die"
            return [*found, check(folder)]


def test_a_file_is_the_old_one_or_the_new_one(tmp_path):
    found = crash_everywhere(
        tmp_path,
        lambda folder: write_atomically(folder / "a", b"old"),
        lambda folder: write_atomically(folder / "a", b"new"),
        lambda folder: (folder / "a").read_text(),
    )
    assert found == ["old", "old", "new"], "opened, renamed, done"


def test_a_file_written_in_place_would_be_lost(tmp_path):
    """The null of the test above: its crashes do harm."""
    (tmp_path / "a").write_text("old")
    with pytest.raises(Crash), crashing(tmp_path, 1), (tmp_path / "a").open("w") as file:
        (tmp_path / "b").write_text("something else")
        file.write("new")
    assert (tmp_path / "a").read_text() == ""


def save(folder, step):
    save_checkpoint(folder, step, {"weights": torch.full((4,), float(step))}, {"step": step})


def loaded(folder):
    tensors, state = load_checkpoint(folder)
    assert tensors["weights"].tolist() == [state["step"]] * 4
    return {20: "old", 30: "new"}[state["step"]]


def test_a_checkpoint_is_the_old_one_or_the_new_one(tmp_path):
    """The third one, so that the first is removed."""
    found = crash_everywhere(
        tmp_path, lambda folder: [save(folder, step) for step in (10, 20)], lambda folder: save(folder, 30), loaded
    )
    assert found == sorted(found, reverse=True) and {"old", "new"} == set(found) and len(found) > 5
    for folder in tmp_path.iterdir():
        assert {path.name for path in folder.iterdir()} - {".removed"} == {"step-000000020", "step-000000030"}


def test_a_folder_is_never_half_a_folder(tmp_path):
    """Replaced, it may be gone between two renames, for there is no way to exchange folders; it is never a mixture."""

    def write(folder, text):
        with whole_folder(folder / "model") as unfinished:
            for name in ("a", "b"):
                (unfinished / name).write_text(text)

    def read(folder):
        texts = {path.read_text() for path in (folder / "model").glob("*")}
        assert len(texts) < 2
        return texts.pop() if texts else "none"

    found = crash_everywhere(tmp_path, lambda folder: write(folder, "old"), lambda folder: write(folder, "new"), read)
    assert found == sorted(found, key=["old", "none", "new"].index) and found.count("new") == 1


def test_a_checkpoint_that_is_there_is_not_written_again(tmp_path):
    """For while it is replaced there would be none."""
    save(tmp_path, 30)
    with crashing(tmp_path) as operations:
        save(tmp_path, 30)
    assert not operations


def test_a_run_folder_can_be_begun_again_wherever_it_died(tmp_path):
    def begin(folder):
        RunFolder.create(folder / "run", Options(), resume=True)

    def check(folder):
        names = {path.name for path in (folder / "run").iterdir()}
        return "new" if names == {"config.yaml", "command.txt", "environment.json"} else "old"

    def prepare(folder):
        (folder / "run").mkdir()

    assert crash_everywhere(tmp_path, prepare, begin, check)[-1] == "new"


def test_what_is_renamed_is_on_the_disk_and_so_is_the_rename(tmp_path, monkeypatch):
    """By the order of the operations: files flushed, then renamed, then the folder flushed."""
    events, flush, rename = [], os.fsync, os.rename

    def flushed(descriptor):
        events.append(os.readlink(f"/proc/self/fd/{descriptor}").removeprefix(f"{tmp_path}").lstrip("/") or ".")
        flush(descriptor)

    monkeypatch.setattr(os, "fsync", flushed)
    monkeypatch.setattr(os, "rename", lambda source, target: [events.append("rename"), rename(source, target)])
    monkeypatch.setattr(os, "replace", lambda source, target: [events.append("rename"), rename(source, target)])
    write_atomically(tmp_path / "a", b"new")
    assert events == ["a.tmp", "rename", "."]
    events.clear()
    save(tmp_path, 30)
    assert {".unfinished/tensors.safetensors", ".unfinished/state.json", ".unfinished"} == set(events[:3])
    assert events[3:] == ["rename", "."]


@pytest.mark.parametrize("tail", [b"", b'{"step": 3, "lo', b'{"step": 3}', b"\xff\x00\x00"])
def test_a_torn_last_line_is_dropped(tmp_path, tail):
    folder = RunFolder.create(tmp_path / "run", Options())
    for step in (1, 2):
        folder.log(step=step)
    with (folder.path / "metrics.jsonl").open("ab") as file:
        file.write(tail)
    assert folder.metrics() == [{"step": 1}, {"step": 2}]
    folder.truncate_metrics(2)  # as trainings that are resumed do
    folder.log(step=3)
    assert [line["step"] for line in folder.metrics()] == [1, 2, 3]


@pytest.mark.parametrize("line", ['{"step": 2', "", "3", '{"step": "\ud800'])
def test_a_broken_line_in_the_middle_is_named(tmp_path, line):
    folder = RunFolder.create(tmp_path / "run", Options())
    folder.log(step=1)
    with (folder.path / "metrics.jsonl").open("ab") as file:
        file.write(line.encode(errors="surrogatepass") + b'\n{"step": 3}\n')
    with pytest.raises(InputError, match=r"metrics.jsonl', line 2, is .*; mend or remove the line"):
        folder.metrics()


def train(monkeypatch, place, out, *more):
    where = ["--backbone", place / "vlm", "--data", place / "data", "--out", out]
    command(monkeypatch, train_rl.main, *where, *OPTIONS.split(), *more)


def outcome(out):
    weights = load_file(out / "controller.safetensors")
    return {name: value.tolist() for name, value in weights.items()}, (out / "metrics.jsonl").read_text()


def test_the_remedy_for_an_unreadable_checkpoint_works(monkeypatch, place, tmp_path, capsys):
    """With one before, and with none; and what a kill leaves in the folders does no harm."""
    out = tmp_path / "run"
    small = ("--total-queries", 8, "--checkpoint-every", 4)
    train(monkeypatch, place, out, *small)
    whole = outcome(out)
    for then in ("use the one before", "begin anew"):
        *before, newest = sorted((out / "checkpoints").glob("step-*"))
        if then == "begin anew":
            before[-1].rename(tmp_path / "also removed")
        (newest / "tensors.safetensors").write_bytes(b"torn")
        (out / "result.json").rename(out / "result.json.tmp")
        with pytest.raises(SystemExit):
            train(monkeypatch, place, out, *small, "--resume")
        error = capsys.readouterr().err.strip().splitlines()[-1]
        assert f"{newest.name}' cannot be read" in error and error.endswith(f"; remove it to {then}")
        newest.rename(tmp_path / f"removed to {then}")
        (out / "checkpoints" / ".unfinished").mkdir()
        train(monkeypatch, place, out, *small, "--resume")
        assert outcome(out) == whole and (out / "result.json").exists()


SMALL = ("--total-queries", 12, "--checkpoint-every", 4)


@pytest.fixture(scope="module")
def roomy(place, tmp_path_factory):
    """What comes of a small training on a disk that has room."""
    out = tmp_path_factory.mktemp("roomy") / "run"
    with pytest.MonkeyPatch.context() as patch:
        train(patch, place, out, *SMALL)
    return outcome(out)


@contextmanager
def at_most(size):
    """Files that grow beyond so many bytes cannot be written, as on a disk that is full."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize(("file", "method"), [("metrics.jsonl", "log"), ("timing.jsonl", "log_timing")])
def test_a_disk_that_is_full_of_metrics_stops_a_training(monkeypatch, place, roomy, tmp_path, capsys, file, method):
    """In the middle of a line; with room again it goes on as if nothing had been."""
    write = getattr(RunFolder, method)

    def full(self, **line):
        if line["queries"] < 8:
            return write(self, **line)
        with at_most((self.path / file).stat().st_size + 10):
            return write(self, **line)

    out = tmp_path / "full"
    with monkeypatch.context() as patch, pytest.raises(SystemExit) as caught:
        patch.setattr(RunFolder, method, full)
        train(patch, place, out, *SMALL)
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert caught.value.code == 2 and error.startswith(f"error: {str(out / file)!r} cannot be written (File too large)")
    assert error.endswith("after 8 queries, the last checkpoint is kept") and not (out / file).read_text().endswith(
        "\n"
    )
    train(monkeypatch, place, out, *SMALL, "--resume")
    assert outcome(out) == roomy


@pytest.mark.parametrize("number", [errno.ENOSPC, None])
def test_a_disk_that_is_full_of_checkpoints_stops_a_training(monkeypatch, place, roomy, tmp_path, capsys, number):
    """By its own word, or, with none, by a limit that safetensors runs into."""

    def full(folder, step, *what):
        if step < 8:
            return save_checkpoint(folder, step, *what)
        if number is not None:
            monkeypatch.setattr("maskgym.training.checkpoints.save_file", refusing)
        with at_most(1000):
            return save_checkpoint(folder, step, *what)

    def refusing(*_):
        raise OSError(number, os.strerror(number))

    out = tmp_path / "full"
    with monkeypatch.context() as patch, pytest.raises(SystemExit) as caught:
        patch.setattr(train_rl, "save_checkpoint", full)
        train(patch, place, out, *SMALL)
    error = capsys.readouterr().err.strip().splitlines()[-1]
    why = "File too large" if number is None else os.strerror(number)
    assert caught.value.code == 2 and "step-000000008' cannot be written" in error and why in error
    assert error.endswith("after 8 queries, the last checkpoint is kept")
    names = sorted(path.name for path in (out / "checkpoints").iterdir())
    assert names == ["step-000000000", "step-000000004"], "what was half written takes no room"
    monkeypatch.setattr("maskgym.training.checkpoints.save_file", save_file)
    train(monkeypatch, place, out, *SMALL, "--resume")
    assert outcome(out) == roomy


def test_a_disk_that_is_full_anywhere_is_told_in_one_line(capsys):
    """Of what other libraries write. The null: other errors are no input's."""

    def main():
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "/somewhere")

    with pytest.raises(SystemExit) as caught:
        cli.run(main, cli.RESUME)
    line = "error: [Errno 28] No space left on device: '/somewhere'; make room, then go on with the same command"
    assert caught.value.code == 2 and capsys.readouterr().err == f"{line} and --resume\n"

    def other():
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with pytest.raises(OSError, match="Input/output error"):
        cli.run(other)


def test_an_unreadable_backbone_checkpoint_is_named_and_the_one_before_is_used(monkeypatch, place, tmp_path, capsys):
    def run(*more):
        command(monkeypatch, train_backbone.main, "--data", place / "data", "--out", tmp_path / "run", *more)
        return load_file(tmp_path / "run" / "model" / "model.safetensors")

    whole = run(*BACKBONE_OPTIONS.split())
    checkpoints = tmp_path / "run" / "checkpoints"
    assert {path.name for path in checkpoints.glob("checkpoint-*")} == {"checkpoint-4", "checkpoint-6"}
    for name in ("model.safetensors", "optimizer.pt", "trainer_state.json"):
        kept = (checkpoints / "checkpoint-6" / name).read_bytes()
        (checkpoints / "checkpoint-6" / name).write_bytes(b"torn")
        with pytest.raises(SystemExit):
            run("--resume")
        error = capsys.readouterr().err.strip().splitlines()[-1]
        assert "checkpoint-6' cannot be read" in error and error.endswith("; remove it to use the one before")
        (checkpoints / "checkpoint-6" / name).write_bytes(kept)
    (checkpoints / "checkpoint-6").rename(tmp_path / "removed")
    again = run("--resume")
    assert all(torch.equal(whole[name], again[name]) for name in whole)


def test_two_processes_cannot_train_in_one_folder(tmp_path):
    """The null: the process that has begun may come back."""
    RunFolder.create(tmp_path / "run", Options())
    RunFolder.create(tmp_path / "run", Options(), resume=True)
    child = os.fork()
    if not child:
        try:
            RunFolder.create(tmp_path / "run", Options(), resume=True)
        except InputError as error:
            os._exit(40 if "is in use by another process; let it end" in str(error) else 41)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 40


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A training that was not killed, and how long it took."""
    folder = tmp_path_factory.mktemp("whole")
    warm_up()
    return unkilled("rl", make_place(folder), folder)


def test_killed_by_sigkill_and_resumed_is_never_killed(whole, tmp_path):
    """A few of what ``python -m tests.kill_and_resume`` does many times."""
    assert killed(*whole, tmp_path / "killed", 2, random.Random(3)) > 0


@pytest.mark.parametrize(
    ("name", "what"), [("controller.safetensors", "weights"), ("metrics.jsonl", "metrics"), ("result.json", "results")]
)
def test_a_difference_would_be_seen(whole, tmp_path, name, what):
    """The null of the test above: in the last bit of the last weight, in one figure of metrics or results."""
    shutil.copytree(whole[0].out, tmp_path / "run")
    content = bytearray((tmp_path / "run" / name).read_bytes())
    last = -1 if what == "weights" else max(content.rfind(digit) for digit in b"0123456789")
    content[last] ^= 1
    (tmp_path / "run" / name).write_bytes(content)
    with pytest.raises(AssertionError, match=f"{what} of .* differ after 0 kills"):
        killed(*whole, tmp_path / "run", 0, random.Random(0))


def test_a_training_of_train_gumbel_continues_anywhere(monkeypatch, place, tmp_path):
    """Stopped between two lines of metrics, the first half of the line is not forgotten; from the checkpoint after a
    validation, though it was overdue, or the last one, nothing is done twice."""
    options = "--budgets 0.6 1 --test-budgets 0.6 --batch-size 8 --total-queries 128 --estimator adallava-l"
    often = "--validate-every 32 --checkpoint-every 64"
    where = ["--backbone", place / "vlm", "--data", place / "data", *options.split(), *often.split()]
    command(monkeypatch, train_gumbel.main, *where, "--out", tmp_path / "whole")
    step = train_gumbel.Trainer.step

    def stopping(self):
        if self.queries in (40, 64):
            os.kill(os.getpid(), signal.SIGTERM)
        return step(self)

    def stopped_where(patched, name, value, *more):
        with monkeypatch.context() as patch, pytest.raises(SystemExit) as caught:
            patch.setattr(patched, name, value)
            command(patch, train_gumbel.main, *where, "--out", tmp_path / "stopped", *more)
        assert caught.value.code == 143

    stopped_where(train_gumbel.Trainer, "step", stopping)
    newest = sorted((tmp_path / "stopped" / "checkpoints").iterdir())[-1]
    assert len(json.loads((newest / "state.json").read_text())["recent"]) == 6
    stopped_where(train_gumbel.Trainer, "step", stopping, "--resume")
    *_, at_64, at_72 = sorted((tmp_path / "stopped" / "checkpoints").glob("step-*"))
    assert (at_64.name, at_72.name) == ("step-000000064", "step-000000072")
    shutil.rmtree(at_72)
    stopped_where(train_gumbel, "conclude", lambda *_: os.kill(os.getpid(), signal.SIGTERM), "--resume")
    command(monkeypatch, train_gumbel.main, *where, "--out", tmp_path / "stopped", "--resume")
    assert outcome(tmp_path / "whole") == outcome(tmp_path / "stopped")
