"""``maskgym`` is the one name that is installed: a user's own ``envs/`` or ``eval.py`` is another thing. Torch
waits."""

import ast
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import maskgym
from maskgym.__main__ import COMMANDS, main
from maskgym.common.run_folder import command_line
from maskgym.eval import cli
from tests.pages import PAGES

ROOT = Path(__file__).parent.parent
ROOMS = ("backbones", "envs", "eval", "policies")

WITHOUT_TORCH = """
import sys

import gymnasium
import maskgym
from maskgym.__main__ import main


def said(*words):
    sys.argv = ["/anywhere/bin/maskgym", *words]
    try:
        main()
    except SystemExit as ended:
        assert ended.code == 0, ended.code


said("--help")
gymnasium.spec("maskgym/Masking-v0")
import backbones, common, envs, eval, policies

assert "torch" not in sys.modules, "importing maskgym takes as long as importing torch"
"""
WITH_ALL = f"""{WITHOUT_TORCH}
assert maskgym.load_backbone.__module__ == "maskgym.backbones.loading.load"
said("eval", "run", "--help")
said("train-rl", "--help")
for module in (backbones, common, envs, eval, policies):
    assert module.OWNER == "the user", module
rooms = {{"backbones", "envs", "eval", "policies"}}
assert {{name for name in sys.modules if name.partition(".")[0] in rooms}} == rooms
"""


@pytest.mark.parametrize(
    "session", [WITHOUT_TORCH, pytest.param(WITH_ALL, marks=pytest.mark.slow)], ids=["without torch", "with all"]
)
def test_own_folders_and_ours_leave_each_other_alone(tmp_path, session):
    """In a working directory with packages of the old names, imported before ours."""
    here, site = tmp_path / "here", tmp_path / "site"
    for room in ("backbones", "common", "envs", "policies"):
        (here / room).mkdir(parents=True)
        (here / room / "__init__.py").write_text("OWNER = 'the user'\n")
    (here / "eval.py").write_text("OWNER = 'the user'\n")
    site.mkdir()
    (site / "maskgym").symlink_to(ROOT / "maskgym")  # as if installed: nothing else of the checkout is on the path
    done = subprocess.run(
        [sys.executable, "-c", session],
        cwd=here,
        env={**os.environ, "PYTHONPATH": str(site)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "usage: maskgym COMMAND" in done.stdout
    if session == WITH_ALL:
        assert "usage: maskgym eval run" in done.stdout and "usage: maskgym train-rl" in done.stdout


@pytest.mark.slow
def test_a_wheel_has_one_name_at_its_top_and_all_modules(tmp_path):
    """Built from a copy without links, as a system without them has it."""
    pytest.importorskip("setuptools", minversion="77")
    copy = tmp_path / "copy"
    copy.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy)
    for room in ("maskgym", *ROOMS):
        hidden = {entry.name for entry in (ROOT / room).iterdir() if entry.is_symlink()} | {"__pycache__"}
        shutil.copytree(ROOT / room, copy / room, ignore=lambda _, names, hidden=hidden: hidden & set(names))
    build = "import sys; from setuptools.build_meta import build_wheel; build_wheel(sys.argv[1])"
    done = subprocess.run(
        [sys.executable, "-c", build, str(tmp_path)], cwd=copy, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    with zipfile.ZipFile(next(tmp_path.glob("*.whl"))) as wheel:
        packed = set(wheel.namelist())
        (points,) = (name for name in packed if name.endswith("/entry_points.txt"))
        assert "maskgym = maskgym.__main__:main" in wheel.read(points).decode()
    assert {name.partition("/")[0].partition("-")[0] for name in packed} == {"maskgym"}
    modules = {str(path.relative_to(copy)) for path in copy.rglob("*.py") if "build" not in path.parts}
    modules = {module if module.startswith("maskgym/") else f"maskgym/{module}" for module in modules}
    data = {"py.typed", "eval/studies/tuning-grid.txt", "eval/experiment/report.html.j2"}
    for weights in ("tiny_weights", "small_weights"):
        data |= {f"backbones/{weights}/{path.name}" for path in (ROOT / "backbones" / weights).iterdir()}
    assert {name for name in packed if "dist-info" not in name} == modules | {f"maskgym/{name}" for name in data}


def test_names_are_those_that_type_checkers_see():
    tree = ast.parse((ROOT / "maskgym" / "__init__.py").read_text())
    (seen,) = (node for node in tree.body if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING")
    imported = {node.module: tuple(alias.name for alias in node.names) for node in seen.body}
    assert imported == maskgym._FOUND_IN
    assert sorted(maskgym.__all__) == sorted(name for names in imported.values() for name in names)
    assert set(maskgym.__all__) <= set(dir(maskgym))
    for name in maskgym.__all__:
        assert getattr(maskgym, name).__module__.startswith("maskgym.")
    with pytest.raises(AttributeError, match="module 'maskgym' has no attribute 'load_backbones'"):
        _ = maskgym.load_backbones


@pytest.mark.parametrize(
    ("words", "line"),
    [
        ((), "error: '' is no command; maskgym has train-rl, "),
        (("train",), "error: 'train' is no command; maskgym has train-rl, "),
        (("train-rl", "--envs", "none"), "error: Error parsing --envs"),
        (("train-gumbel", "--estimator", "guess"), "error: invalid choice 'guess' for argument '--estimator'"),
        (("train-backbone", "--steps", "0"), "error: --steps is 0; it must be at least 1"),
        (("eval", "run"), "error: no policy given"),
        (("demo", "--port", "0"), "error: --port is 0"),
    ],
)
def test_what_the_console_command_refuses(monkeypatch, capsys, words, line):
    monkeypatch.setattr(sys, "argv", ["/anywhere/bin/maskgym", *words])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2
    (said,) = capsys.readouterr().err.splitlines()
    assert said.startswith(line)


def test_the_console_command_is_written_down_as_it_was_typed(monkeypatch):
    written = []
    monkeypatch.setattr(cli, "run", lambda *_: written.append(command_line()))
    typed = ["maskgym train-rl --out 'a b'", "maskgym eval run full", "maskgym demo even"]
    for words in (["train-rl", "--out", "a b"], ["eval", "run", "full"], ["demo", "even"]):
        monkeypatch.setattr(sys, "argv", ["/anywhere/bin/maskgym", *words])
        main()
    assert written == [*typed[:2], "maskgym eval demo even"]


def test_every_script_has_its_word():
    scripts = {path.stem.replace("_", "-") for path in ROOT.glob("train_*.py")}
    assert scripts == {word for word in COMMANDS if word.startswith("train-")}


def test_pages_import_no_folder():
    """Which in a checkout would be found."""
    folder = re.compile(rf"^\s*(?:from|import) (?:{'|'.join(ROOMS)})\b|python -m eval\b", re.MULTILINE)
    assert folder.search("from envs import load_queries") and not folder.search("from maskgym.envs import x")
    assert [page.name for page in PAGES if folder.search(page.read_text())] == []
