"""Tracking is optional: nothing without being asked, offline without a key, and never the end of a run."""

import pytest

from eval.tracking import Tracker


def test_off_unless_asked(tmp_path):
    tracker = Tracker(None, tmp_path, {})
    tracker.log(1, {"reward": 0.5})
    tracker.finish({})
    assert tracker.run is None and not list(tmp_path.iterdir())


@pytest.mark.filterwarnings("ignore")
def test_offline_without_a_key(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.delenv("WANDB_MODE", raising=False)
    tracker = Tracker("maskgym-test", tmp_path, {"seed": 0})
    assert tracker.run is not None and tracker.run.settings.mode == "offline"
    tracker.log(1, {"reward": 0.5, "nothing": None})
    tracker.finish({})
    assert list((tmp_path / "wandb").glob("offline-run-*/*.wandb"))


@pytest.mark.filterwarnings("ignore")
def test_a_failing_wandb_does_not_end_the_run(tmp_path, monkeypatch, capsys):
    import wandb

    def refuse(**_):
        raise RuntimeError("no network")

    monkeypatch.setattr(wandb, "init", refuse)
    tracker = Tracker("maskgym-test", tmp_path, {})
    tracker.log(1, {"reward": 0.5})
    tracker.finish({})
    assert "wandb is not available (no network); going on without it" in capsys.readouterr().err
