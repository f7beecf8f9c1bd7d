"""Rewards that never return are stopped, and name themselves; what was there before the limit is there after it."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

import maskgym.training.rl as train_rl
from maskgym.backbones import InputError
from maskgym.common.time_limit import LONGEST_ALARM, TimeLimitError, within
from maskgym.envs.reward_spec import WeightedReward
from maskgym.training.checkpoints import load_checkpoint
from tests.conftest import command
from tests.test_rewards import TERMS
from tests.test_train_rl import train

SELF = "tests.test_time_limit"


@pytest.fixture(autouse=True)
def nothing_is_left():
    """After each test no alarm is set, and the handler is what it was."""
    before = signal.getsignal(signal.SIGALRM)
    yield
    assert signal.getsignal(signal.SIGALRM) is before and signal.getitimer(signal.ITIMER_REAL) == (0, 0)


def seconds_of(call):
    began = time.monotonic()
    with pytest.raises(TimeLimitError, match=r"it did not return within 0\.1 s"):
        within(0.1, call)
    return time.monotonic() - began


def spin():
    while True:
        pass


def swallow():
    while True:
        with contextlib.suppress(Exception):
            time.sleep(0.01)


def swallow_once():
    with contextlib.suppress(BaseException):
        time.sleep(60)
    time.sleep(60)


@pytest.mark.parametrize(
    "call",
    [
        lambda: time.sleep(60),
        spin,
        swallow,
        lambda: threading.Event().wait(),
        lambda: subprocess.run(["sleep", "60"], check=True),
        lambda: os.read(os.pipe()[0], 1),
        swallow_once,  # by the second alarm
    ],
)
def test_what_never_returns_is_stopped(call):
    """Long before it would have ended; how long before is for a machine that may be busy."""
    assert seconds_of(call) < 30


def test_what_returns_in_time_is_as_without_a_limit():
    assert within(5, lambda: 3) == within(0, lambda: 3) == within(100 * LONGEST_ALARM, lambda: 3) == 3
    for kind in (ValueError, SystemExit, KeyboardInterrupt):
        with pytest.raises(kind):
            within(5, lambda kind=kind: (_ for _ in ()).throw(kind))


def test_a_limit_within_a_limit():
    """The nearer one ends its own call; what is left of the farther one is kept."""
    began = time.monotonic()
    with pytest.raises(TimeLimitError, match=r"within 0\.4 s"):
        within(0.4, lambda: (seconds_of(lambda: time.sleep(60)), time.sleep(60)))
    assert 0.35 < time.monotonic() - began < 30
    with pytest.raises(TimeLimitError, match=r"within 0\.1 s"):
        within(0.1, lambda: within(30, lambda: time.sleep(60)))
    assert within(30, lambda: within(0.05, lambda: 3)) == 3


def test_an_alarm_of_somebody_elses_rings_when_it_is_due():
    """Within a limit, where it may end the call, or after it; and one that repeats goes on."""

    def rings(number, frame):
        raise LookupError

    before = signal.signal(signal.SIGALRM, rings)
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.1)
        with pytest.raises(LookupError):
            within(30, lambda: time.sleep(60))
        signal.setitimer(signal.ITIMER_REAL, 0.3)
        seconds_of(lambda: time.sleep(60))
        with pytest.raises(LookupError):
            time.sleep(60)
        heard = []
        signal.signal(signal.SIGALRM, lambda *_: heard.append(1))
        signal.setitimer(signal.ITIMER_REAL, 0.02, 0.02)
        seconds_of(lambda: time.sleep(60))
        among = len(heard)
        time.sleep(0.1)
        signal.setitimer(signal.ITIMER_REAL, 0)
        assert among > 1 and len(heard) > among + 1
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def test_other_threads_have_no_limit():
    """As is said: signals are the main thread's."""
    found = []
    thread = threading.Thread(target=lambda: found.append(within(0.01, lambda: time.sleep(0.1) or 3)))
    thread.start()
    thread.join()
    assert found == [3]


@pytest.mark.parametrize("seconds", [-1, float("nan"), float("inf"), "300", None])
def test_limits_that_are_none_are_refused(seconds):
    with pytest.raises(InputError, match=r"reward_seconds is .*; give a number of seconds, or 0 for no limit"):
        WeightedReward("accuracy", seconds)


def ending(terms):
    sys.exit(0)


def interrupting(terms):
    raise KeyboardInterrupt


def colouring(terms):
    raise ValueError("\x1b[31mred\x07\u202e\nand more")


@pytest.mark.parametrize(
    ("function", "words"),
    [
        (ending, r"reward 'ending' raised SystemExit: 0 \(queries a, b, c\)"),
        (colouring, r"reward 'colouring' raised ValueError: \\x1b\[31mred\\x07\\u202e and more \(queries a, b, c\)"),
        (lambda terms: time.sleep(60), r"reward '<lambda>' did not return within 0\.1 s \(queries a, b, c\); mend it"),
    ],
)
def test_rewards_that_end_the_process_the_line_or_nothing(function, words):
    with pytest.raises(InputError, match=words):
        WeightedReward(function, 0.1)(TERMS, ["a", "b", "c"])


def test_only_a_command_takes_an_interrupt_for_a_failure():
    """For commands hear Ctrl-C in another way; elsewhere it may be the user's."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            WeightedReward(interrupting)(TERMS)
        signal.signal(signal.SIGINT, lambda *_: None)
        with pytest.raises(InputError, match="reward 'interrupting' raised KeyboardInterrupt"):
            WeightedReward(interrupting)(TERMS)
    finally:
        signal.signal(signal.SIGINT, before)


class Remembering:
    """A reward with a state of its own making."""

    def __init__(self, state):
        self.state = state

    def __call__(self, terms):
        return terms.accuracy


@pytest.mark.parametrize(
    ("state", "words"),
    [
        (lambda: {"seen": {1, 2}}, r"has a state\(\) that is no JSON \(Object of type set is not JSON serializable\)"),
        (lambda: 1 / 0, r"raised ZeroDivisionError: division by zero \(in its state\(\)\)"),
        (lambda: sys.exit(), r"raised SystemExit: .*\(in its state\(\)\)"),
        (lambda: time.sleep(60), r"did not return within 0\.1 s \(in its state\(\)\)"),
    ],
)
def test_states_that_cannot_be_saved_name_their_reward(state, words):
    with pytest.raises(InputError, match=f"reward 'Remembering' {words}"):
        WeightedReward(Remembering(state), 0.1).state()


@pytest.mark.parametrize("content", ["import sys; sys.exit(0)", "raise KeyboardInterrupt"])
def test_a_module_that_ends_the_process_is_refused(content, monkeypatch, place, tmp_path, capsys):
    """By the command, with status 2: a script that was meant to be run, say."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    name = f"ends_{abs(hash(content))}"
    Path(f"{name}.py").write_text(content, encoding="utf-8")
    with pytest.raises(SystemExit) as caught:
        train(monkeypatch, place, tmp_path / "run", "--reward", f"{name}:f")
    assert caught.value.code == 2 and f"reward '{name}:f' cannot be imported (" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


class Later:
    """A reward that no longer works from its fifth call on."""

    calls = 0

    def __init__(self, work):
        self.work = work

    def __call__(self, terms):
        self.calls += 1
        return self.work() if self.calls == 5 else terms.accuracy


@pytest.mark.parametrize(
    ("work", "words"),
    [
        (lambda: time.sleep(60), "did not return within 1 s (queries q"),
        (swallow, "did not return within 1 s (queries q"),
        (lambda: sys.exit(0), "raised SystemExit: 0 (queries q"),
    ],
)
@pytest.mark.slow
def test_a_training_ends_before_the_update_and_can_go_on(monkeypatch, place, tmp_path, capsys, work, words):
    """And a run that was stopped so is resumed with another limit."""
    monkeypatch.setitem(globals(), "later", Later(work))
    options = ["--reward", f"{SELF}:later", "--reward-seconds", 1]
    with pytest.raises(SystemExit) as caught:
        train(monkeypatch, place, tmp_path / "run", *options)
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert caught.value.code == 2 and error.startswith(f"error: reward '{SELF}:later' {words}")
    assert error.endswith("after 8 queries, the last checkpoint is kept")
    assert load_checkpoint(tmp_path / "run" / "checkpoints")[1]["queries"] == 8
    train(monkeypatch, place, tmp_path / "run", "--resume", "--reward", f"{SELF}:later", "--reward-seconds", 0)
    assert len(json.loads((tmp_path / "run" / "result.json").read_text())) == 5


def steady(terms):
    steady.seen.append(signal.getitimer(signal.ITIMER_REAL)[0])
    return np.ones(len(terms))


@pytest.mark.parametrize(("options", "limited"), [([], True), (["--reward-seconds", 0], False)])
@pytest.mark.slow
def test_trainings_have_a_limit_unless_it_is_switched_off(monkeypatch, place, tmp_path, options, limited):
    steady.seen = []
    train(monkeypatch, place, tmp_path / "run", "--reward", f"{SELF}:steady", "--total-queries", 4, *options)
    assert steady.seen and all((299 < left <= 300) if limited else left == 0 for left in steady.seen)


@pytest.mark.slow
def test_the_limit_is_no_part_of_what_a_run_is(monkeypatch, place, tmp_path):
    train(monkeypatch, place, tmp_path / "run", "--total-queries", 4, "--reward-seconds", 5)
    assert "reward_seconds" not in (tmp_path / "run" / "config.yaml").read_text()
    where = ["--backbone", place / "vlm", "--data", place / "data", "--out", tmp_path / "run"]
    command(monkeypatch, train_rl.main, *where, "--resume", "--reward-seconds", 7)
