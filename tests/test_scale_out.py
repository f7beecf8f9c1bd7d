import json

import numpy as np
import pytest

import maskgym.eval.__main__ as eval_main
from maskgym.eval.studies.scale_out import simulate
from tests.conftest import command


def test_alike_workers_and_a_free_learner_scale_without_loss():
    found = simulate(np.full(5, 0.2), 0.0, 0.0, workers=16, rows=100, steps=50)
    assert found.plans_per_second == pytest.approx(16 * 100 / 0.2)
    assert (found.speed_up, found.learner_share, found.straggler_share) == pytest.approx((16, 0, 0))


def test_the_learner_is_the_limit():
    """By hand: a worker 0.3 s, the learner 0.1 s a share, so 4 workers take 0.3 + 0.4 s where one takes 0.4 s."""
    found = simulate(np.full(5, 0.3), 0.1, 0.0, workers=4, rows=10, steps=5)
    assert found.plans_per_second == pytest.approx(40 / 0.7)
    assert found.speed_up == pytest.approx(4 * 0.4 / 0.7)
    assert found.learner_share == pytest.approx(0.4 / 0.7)


def test_the_slowest_is_waited_for():
    """Two workers of 1 s or 3 s, evenly likely: the slowest takes 2.5 s on average, the mean 2 s."""
    found = simulate(np.array([1.0, 3.0]), 0.0, 0.5, workers=2, rows=1, steps=20_000)
    assert found.plans_per_second == pytest.approx(2 / 3, rel=0.02)
    assert found.straggler_share == pytest.approx(0.5 / 3, rel=0.05)


def test_the_command_measures_and_prints(monkeypatch, place, tmp_path, capsys):
    out = tmp_path / "scale.json"
    where = ["--backbone", place / "vlm", "--data", place / "data", "--json", out]
    options = "--rows 4 --repeats 2 --epochs 1 --workers 2 1 --steps 10"
    command(monkeypatch, eval_main.main, "scale-out", *where, *options.split())
    printed = capsys.readouterr().out
    assert "4 plans: a worker takes" in printed and "learner's share %" in printed
    one, two = json.loads(out.read_text())
    assert (one["workers"], two["workers"]) == (1, 2) and one["speed_up"] == pytest.approx(1, rel=0.5)
    assert 0 < two["learner_share"] < 1 and two["plans_per_second"] > 0


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ("--rows 0", "--rows is 0; it must be at least 1"),
        ("--workers 4 0", "--workers is 4 0; give numbers of at least 1"),
        ("--slower 0", "--slower 0 must be above 0"),
    ],
)
def test_bad_options_are_named(monkeypatch, place, capsys, options, words):
    with pytest.raises(SystemExit):
        command(monkeypatch, eval_main.main, "scale-out", *options.split())
    assert words in capsys.readouterr().err
