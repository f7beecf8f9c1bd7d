"""Tracking is optional: nothing without being asked, offline without a key, and never the end of a run."""

import json

import pytest
from PIL import Image

from maskgym.common.tracking import Tracker


def test_off_unless_asked(tmp_path):
    tracker = Tracker(None, tmp_path, {})
    tracker.log(1, {"reward": 0.5})
    tracker.report({}, {}, tmp_path / "none.html")
    tracker.finish({})
    assert tracker.run is None and not list(tmp_path.iterdir())


@pytest.mark.filterwarnings("ignore")
@pytest.mark.slow
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
@pytest.mark.slow
def test_a_report_is_sent_whole(tmp_path, monkeypatch):
    """Tables with their head, the page as it is, figures in the summary, images; all without a network."""
    monkeypatch.setenv("WANDB_MODE", "offline")
    (tmp_path / "report.html").write_text("<h1>What was found</h1>")
    Image.new("RGB", (4, 4), "red").save(tmp_path / "plot.png")
    tracker = Tracker("maskgym-test", tmp_path, {"seeds": "0"}, "scenes")
    assert tracker.run.settings.run_group == "scenes"
    rows = [["policy", "area"], ["rl", "95.3"], ["gumbel", "94.9"]]
    tracker.report({"area/rl": 0.953}, {"accuracy": rows}, tmp_path / "report.html")
    assert tracker.run.summary["area/rl"] == 0.953
    tracker.finish({"plot": tmp_path / "plot.png"})
    (media,) = tmp_path.glob("wandb/offline-run-*/files/media")
    (sent,) = media.glob("table/accuracy_*.table.json")
    table = json.loads(sent.read_text())
    assert [table["columns"], *table["data"]] == rows
    assert [file.read_text() for file in media.glob("html/*.html")] == ["<h1>What was found</h1>"]
    assert len(list(media.glob("images/plot_*.png"))) == 1


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
