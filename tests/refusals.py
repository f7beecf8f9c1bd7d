"""What every refusal of bad input has in common, and the files that the tables of bad input are about."""

from __future__ import annotations

import hashlib
import json
import re
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

import maskgym.eval.__main__ as eval_main
import maskgym.training.backbone as train_backbone
import maskgym.training.gumbel as train_gumbel
import maskgym.training.rl as train_rl
from maskgym.backbones import load_backbone
from maskgym.backbones.latency_model import LatencyModel
from maskgym.common.run_folder import RunFolder
from maskgym.eval import cli
from maskgym.eval.measure.latency import device_name
from maskgym.policies.controller.learned import save_controller
from maskgym.policies.controller.network import TwoLevelController
from maskgym.policies.static.searched import SearchedOrder

PROGRAMS = {
    "train_rl": train_rl.main,
    "train_gumbel": train_gumbel.main,
    "train_backbone": train_backbone.main,
    "eval": eval_main.main,
}
BAR = re.compile(r"\d+%\||\d+ ?(it|query|plan|unit|setting|policy|image|step|example)?s? ?\[\d\d:\d\d")
"""Of a progress bar, which is no message."""

LINE_LIMIT = 1200
"""A line that is longer was not written for people."""


@dataclass(frozen=True)
class Line:
    """A command that must be refused.

    Attributes:
        command: a program of ``PROGRAMS`` and its arguments, ``{name}`` standing for a place; arguments with blanks
            are joined by ``~``.
        words: that the one line on standard error must have: the offending value, or the remedy.
    """

    command: str
    words: str


def snapshot(*folders: Path) -> dict[str, str]:
    """A digest of every file below some folders; of folders and links that they are there."""
    found: dict[str, str] = {}
    for folder in folders:
        for path in sorted(folder.rglob("*")):
            plain = path.is_file() and not path.is_symlink()
            found[str(path)] = hashlib.sha256(path.read_bytes()).hexdigest() if plain else "there"
    return found


def said(error: str) -> list[str]:
    """The lines of standard error that are no progress bars."""
    lines = [line.rsplit("\r", 1)[-1].strip() for line in error.splitlines()]
    return [line for line in lines if line and not BAR.search(line)]


def check_line(line: Line, monkeypatch, capsys, watched: Path, places: dict[str, object]) -> str:
    """Run a command as from the shell, in a fresh folder: status 2, one line with the words, and nothing written."""
    own = Path(tempfile.mkdtemp(dir=watched))
    monkeypatch.chdir(own)
    before = snapshot(watched)
    program, *arguments = [part.replace("~", " ").format(**places) for part in line.command.split()]
    monkeypatch.setattr(sys, "argv", [program, *arguments])
    with pytest.raises(SystemExit) as caught:
        cli.run(PROGRAMS[program])
    errors = said(capsys.readouterr().err)
    assert caught.value.code == 2
    assert len(errors) == 1 and errors[0].startswith("error: ") and len(errors[0]) < LINE_LIMIT, errors
    assert line.words.format(**places) in errors[0], errors[0]
    after = snapshot(watched)
    assert after == before, sorted(after.items() ^ before.items())
    return errors[0]


def lay_out_desk(place: Path) -> dict[str, Path]:
    """Places by name: ``vlm``, ``data``, ``run``; what is whole, and what is not."""
    desk = place / "desk"
    desk.mkdir()
    named = {name: place / name for name in ("vlm", "data")}
    named |= {"place": place, "desk": desk, "run": desk / "run", "mine": desk / "mine"}
    backbone = load_backbone(str(named["vlm"]))
    config = train_rl.RLConfig(backbone=str(named["vlm"]), data=str(named["data"]), dtype="float32")
    folder = RunFolder.create(named["run"], config)
    save_controller(TwoLevelController(config.sizes(backbone)), folder.path, backbone)
    named["mine"].mkdir()
    (named["mine"] / "notes.txt").write_text("mine")
    latency = LatencyModel(device_name(torch.device("cpu")), str(named["vlm"]), (0.5, 0.2, 1.0, 30.0, 50.0), 0.01)
    latency.save(desk / "latency.json")
    layout = backbone.layout
    whole = SearchedOrder("test", (layout.tokens, layout.layers, layout.heads), "made", "train", 2, [[0]], [1], [0])
    whole.save(desk / "plan.json")
    other = json.loads((desk / "plan.json").read_text())
    (desk / "other-plan.json").write_text(json.dumps({**other, "layout": [64, 6, 4]}))
    for name, content in FILES.items():
        (desk / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    return named


FILES: dict[str, str | bytes] = {
    "empty": "",
    "text.json": "not JSON",
    "list.json": "[1, 2]",
    "number.json": "3",
    "deep.json": "[" * 100_000,
    "huge.json": json.dumps({"weights": [0, 0, 0, 0, 10**400], "device": "", "backbone": "", "error": 0}),
    "nan.json": json.dumps({"weights": [float("nan")] * 5, "device": "", "backbone": "", "error": 0}),
    "latin.json": '{"\u00e9": 1}'.encode("latin-1"),
    "order.json": json.dumps({"order": [[10**400]], "layout": [16, 3, 4]}),
    "deep.yaml": "[" * 10_000,
    "bomb.yaml": "a: &a [x, x, x, x]\n"
    + "".join(
        f"{b}: &{b} [*{a}, *{a}, *{a}, *{a}]\n" for a, b in zip("abcdefghijklmnop", "bcdefghijklmnopq", strict=True)
    ),
    "bomb-in-option.yaml": "reward: [&a [x, x], &b [*a, *a], &c [*b, *b]]",
    "list.yaml": "- seed",
    "empty.yaml": "",
    "tab.yaml": "seed:\t- 1\n\t x",
    "python.yaml": "seed: !!python/object/apply:os.getcwd []",
    "date.yaml": "seed: 2020-13-45",
    "key.yaml": "? [1]\n: 2",
    "alias.yaml": "seed: *nowhere",
    "null.yaml": "seed: \0",
    "latin.yaml": "data: \u00e9".encode("latin-1"),
    "number-key.yaml": "1: 2",
    "seed-text.yaml": "seed: one",
    "seed-none.yaml": "seed:",
    "seed-float.yaml": "seed: 1.5",
    "seed-list.yaml": "seed: [1, 2]",
    "fit-number.yaml": "fit: 3",
    "fit-text.yaml": "fit: 'no'",
    "one-budget.yaml": "budgets: 0.5",
    "three-budgets.yaml": "budgets: [0.1, 0.5, 1.0]",
    "budgets-text.yaml": "budgets: [low, high]",
    "mapping.yaml": "reward: {accuracy: 1}",
    "infinite.yaml": "learning_rate: .inf",
    "dashed.yaml": "reward: ['accuracy', '--seed']",
    "spelling.yaml": "total-queries: 3",
    "grid-empty.txt": "# nothing\n\n",
    "grid-unknown.txt": "fastw:k=2\n",
    "grid-latin.txt": "fastv:k=2 # \u00e9".encode("latin-1"),
}
