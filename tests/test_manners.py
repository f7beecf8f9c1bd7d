"""Commands behave as commands do, into a pipe that closes, on a full disk, in any locale, terminal and place; and calls
take numbers and pictures in whatever form these plainly are."""

import io
import json
import os
import subprocess
import sys
from decimal import Decimal
from fractions import Fraction
from pathlib import Path
from shutil import copytree

import numpy as np
import pytest
import torch
from PIL import Image

import maskgym.eval.__main__ as eval_main
import maskgym.training.rl as train_rl
from maskgym import AdaptiveVLM
from maskgym.backbones import InputError
from maskgym.common.run_folder import RunFolder
from maskgym.envs import MaskingCore, MaskingEnv
from maskgym.eval import cli
from maskgym.policies import ControllerConfig, TwoLevelController
from tests.conftest import build, command, make_dataset
from tests.refusals import PROGRAMS
from tests.test_runs import Options
from tests.test_train_rl import OPTIONS

ROOT = Path(__file__).parent.parent


@pytest.fixture
def unread():
    """A stream into a pipe whose reader has gone."""
    read, write = os.pipe()
    os.close(read)
    with open(write, "w", encoding="utf-8") as stream:
        yield stream


def ended(main):
    """The status that a command ends with."""
    with pytest.raises(SystemExit) as caught:
        cli.run(main)
    return caught.value.code


def helped(monkeypatch, program):
    monkeypatch.setattr(sys, "argv", [program, "--help"])
    return PROGRAMS[program]


@pytest.mark.parametrize("said", ["--help", "a line", "a line " * 10_000])
def test_output_that_nobody_reads_ends_a_command_without_a_word(monkeypatch, capsys, unread, said):
    """Also where it is met as late as the buffer is emptied; and the interpreter, as it ends, meets nothing more."""
    main = helped(monkeypatch, "train_rl") if said == "--help" else lambda: print(said)
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", unread)
        assert ended(main) == 141
    assert capsys.readouterr().err == ""
    unread.flush()


def test_messages_that_nobody_reads_are_no_traceback(monkeypatch, unread):
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stderr", unread)
        patch.setattr(sys, "argv", ["train_rl.py", "--seed", "none"])
        assert ended(train_rl.main) == 141
    unread.flush()


@pytest.mark.parametrize("name", ["stdout", "stderr"])
def test_a_full_disk_below_the_output_is_told_where_it_can_be(monkeypatch, capsys, name):
    with open("/dev/full", "w", buffering=1, encoding="utf-8") as full, monkeypatch.context() as patch:
        patch.setattr(sys, name, full)
        assert ended(lambda: print("a line", file=full)) == 2
        full.flush()
    line = "error: [Errno 28] No space left on device; make room, then begin anew\n"
    assert capsys.readouterr().err == (line if name == "stdout" else "")


def test_output_that_is_closed_is_dropped(monkeypatch):
    with monkeypatch.context() as patch:
        for name in ("stdout", "stderr"):
            patch.setattr(sys, name, None)
        assert ended(helped(patch, "eval")) == 0
        for stream in (sys.stdout, sys.stderr):
            stream.close()


def test_files_come_before_words(monkeypatch, place, tmp_path, unread):
    """For nobody may read these."""
    unread.reconfigure(line_buffering=True)
    records = tmp_path / "records.json"
    where = ["--backbone", place / "vlm", "--data", place / "data", "--json", records, "--plot", tmp_path / "plot.png"]
    with monkeypatch.context() as patch, pytest.raises(SystemExit) as caught:
        patch.setattr(sys, "stdout", unread)
        command(patch, eval_main.main, "run", "full", *where)
    assert caught.value.code == 141
    assert json.loads(records.read_text())[0]["n"] == 12 and (tmp_path / "plot.png").is_file()


class Terminal(io.TextIOWrapper):
    """What is printed to a terminal of some encoding."""

    def __init__(self, encoding="utf-8"):
        super().__init__(io.BytesIO(), encoding=encoding)

    def isatty(self):
        return True

    def shown(self):
        self.flush()
        return self.buffer.getvalue().decode(self.encoding)


@pytest.mark.parametrize("program", PROGRAMS)
def test_help_is_shown_in_ascii_and_on_narrow_terminals(monkeypatch, program):
    monkeypatch.setenv("COLUMNS", "20")
    monkeypatch.setenv("TERM", "dumb")
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", Terminal("ascii"))
        assert ended(helped(patch, program)) == 0
        shown = sys.stdout.shown()
    assert "usage: " in shown and len(shown) > 1000


@pytest.mark.parametrize(
    ("environment", "coloured"),
    [({"TERM": "xterm"}, True), ({"TERM": "dumb"}, False), ({"TERM": "xterm", "NO_COLOR": "1"}, False)],
)
def test_colours_are_for_terminals_that_want_them(monkeypatch, environment, coloured):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", Terminal())
        assert ended(helped(patch, "train_rl")) == 0
        assert ("\x1b[" in sys.stdout.shown()) == coloured


@pytest.mark.parametrize("columns", [1, 20, 300])
@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])
def test_a_refusal_is_the_same_plain_line_on_any_terminal(monkeypatch, capsys, columns, encoding):
    monkeypatch.setenv("COLUMNS", str(columns))
    monkeypatch.setenv("TERM", "xterm")
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", Terminal(encoding))
        patch.setattr(sys, "argv", ["train_rl.py", "--learning-rate", "high"])
        assert ended(train_rl.main) == 2
    line = "error: Error parsing --learning-rate: could not convert string to float: 'high'; --help lists the options\n"
    assert capsys.readouterr().err == line


def test_what_an_encoding_has_not_is_escaped(monkeypatch):
    """In tables, and in names of files that are no UTF-8."""
    for encoding, shown in (("ascii", r"\xb1 \u2013 \udce9"), ("utf-8", r"± – \udce9")):
        with monkeypatch.context() as patch:
            patch.setattr(sys, "stdout", Terminal(encoding))
            cli.run(lambda: print("± – \udce9"))
            assert sys.stdout.shown() == f"{shown}\n"


SESSION = """
import json, sys
import maskgym.eval.__main__ as evaluation
import maskgym.training.rl as train_rl
from maskgym.eval import cli
for program, arguments, status in json.loads(sys.argv[1]):
    sys.argv = [program, *arguments]
    try:
        cli.run(evaluation.main if program == "eval" else train_rl.main)
    except SystemExit as ended:
        assert ended.code == status, ended.code
    else:
        assert status == 0
print("said to nobody")
"""


@pytest.mark.slow
def test_a_session_in_a_locale_of_ascii(place, tmp_path):
    """A run in a place with other letters is trained and evaluated; every text file is opened with its encoding said.
    Whoever read the output has gone before the first line."""
    out, small = os.fsencode(tmp_path / "bücher").decode("ascii", "surrogateescape"), OPTIONS.replace("24", "4")
    where = ["--data", str(place / "data")]
    begin = ["--backbone", str(place / "vlm"), *where, *small.split(), "--test-queries", "2", "--out", out]
    files = ["--json", out + "/again.json", "--plot", out + "/again.png"]
    commands = [
        ("train_rl.py", begin, 141),
        ("eval", ["run", out, "random", *where, "--budgets", "0.6", *files], 0),
    ]
    plain = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "PYTHONUNBUFFERED": ""}
    strict = {"PYTHONPATH": str(ROOT), "PYTHONWARNDEFAULTENCODING": "1", "PYTHONWARNINGS": "always::EncodingWarning"}
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run(
        [sys.executable, "-c", SESSION, json.dumps(commands)],
        env={**os.environ, **plain, **strict},
        stdout=write,
        stderr=subprocess.PIPE,
        cwd=tmp_path,
        check=False,
    )
    os.close(write)
    errors = done.stderr.decode()
    assert done.returncode == 0 and "Traceback" not in errors, errors[-2000:]
    ours = [line for line in errors.splitlines() if "EncodingWarning" in line and line.startswith(str(ROOT))]
    assert not ours, ours
    run = tmp_path / "bücher"
    policies = [record["policy"] for record in json.loads((run / "again.json").read_text())]
    assert policies == [os.path.basename(out), "random"] and (run / "again.png").is_file()
    assert str(run) in (run / "command.txt").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    "name", ["with blanks", '"quo\'ted"', "of\nlines", "-dashed", "x" * 200, "50 %|$x_$", "ünï", "\x1b[31mred"]
)
@pytest.mark.slow
def test_a_run_may_be_called_anything(monkeypatch, desk, tmp_path, capsys, name):
    copytree(desk["run"], tmp_path / name)
    monkeypatch.chdir(tmp_path)
    capsys.readouterr()
    plot, policy = Path(name, "plot.png"), f"./{name}" if name.startswith("-") else name
    command(monkeypatch, eval_main.main, "run", policy, "--data", desk["data"], "--budgets", 0.6, 1, f"--plot={plot}")
    head, _, *rows = capsys.readouterr().out.splitlines()
    assert len(rows) == 2 and {len(row.replace(r"\|", "").split("|")) for row in (head, *rows)} == {
        len(head.split("|"))
    }
    assert plot.is_file() and "\x1b" not in "".join(rows)


def test_a_run_may_lie_behind_a_link(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    Path("far").mkdir()
    Path("near").symlink_to("far")
    RunFolder.create("near", Options())
    assert RunFolder("far").is_run()
    Path("nowhere").symlink_to("gone")
    with pytest.raises(InputError, match="'nowhere' cannot be written"):
        RunFolder.create("nowhere", Options())


def test_a_name_that_is_no_utf_8_is_refused_before_the_work(tmp_path):
    """safetensors would write there, and not find it again."""
    with pytest.raises(InputError, match=r"caf\\udce9' cannot be made \(no UTF-8\)"):
        RunFolder.create(tmp_path / os.fsdecode(b"caf\xe9"), Options())
    assert not list(tmp_path.iterdir())


@pytest.fixture(scope="module")
def vlm():
    backbone = build()
    controller = TwoLevelController(ControllerConfig.for_layout(backbone.layout, backbone.hidden, width=8))
    return AdaptiveVLM(controller, backbone, "made")


EACH = {
    "numbers": [0.75, 1],
    "a tuple": (0.75, 1.0),
    "an array": np.array([0.75, 1], np.float16),
    "a tensor": torch.tensor([0.75, 1], dtype=torch.bfloat16),
    "scalars of each kind": [np.float32(0.75), torch.tensor(1.0, requires_grad=True)],
    "exact numbers": [Fraction(3, 4), Decimal(1)],
}
ONE = {
    "a number": 0.75,
    "an exact number": Decimal("0.75"),
    "a scalar": np.float32(0.75),
    "an array without axes": np.array(0.75),
    "a tensor without axes": torch.tensor(0.75),
}


@pytest.mark.parametrize("form", [*EACH, "a generator", *ONE])
def test_budgets_are_taken_in_any_plain_form(vlm, source, form):
    budget = (part for part in (0.75, 1)) if form == "a generator" else {**EACH, **ONE}[form]
    asked, expected = source[0], [0.75, 0.75] if form in ONE else [0.75, 1.0]
    replies = vlm.generate([asked.image] * 2, [asked.question] * 2, budget, max_new_tokens=1)
    assert [reply.budget for reply in replies] == expected
    if form in ONE:
        assert vlm(images=asked.image, text=asked.question, budget=budget)[0]["budget"] == 0.75


@pytest.mark.parametrize("budgets", [*EACH.values(), iter([0.75, 1])], ids=[*EACH, "an iterator"])
def test_bounds_are_taken_in_any_plain_form(small, source, budgets):
    assert MaskingCore(small, source, budgets=budgets).budgets == (0.75, 1.0)


@pytest.mark.parametrize("budget", ONE.values(), ids=ONE)
def test_a_reset_takes_a_budget_in_any_plain_form(small, source, budget):
    environment = MaskingEnv(backbone=small, data=source)
    observation, _ = environment.reset(seed=0, options={"budget": budget, "query": torch.tensor(3)})
    assert observation["budget"] == np.float32(0.75) and observation["query"] == 3


def test_queries_are_taken_one_after_the_other(vlm, source):
    """Lists, tuples, generators, columns of a data set; one of each."""
    asked = [source[0], source[2]]
    images, texts = [query.image for query in asked], [query.question for query in asked]
    expected = [reply.text for reply in vlm.generate(images, texts, max_new_tokens=2)]
    for pictures, questions in (
        (iter(images), iter(texts)),
        (tuple(images), np.array(texts)),
        (make_dataset().select([0, 2])["image"], texts),
    ):
        assert [reply.text for reply in vlm.generate(pictures, questions, max_new_tokens=2)] == expected
    rows = vlm(images=(image for image in images), text=(text for text in texts), max_new_tokens=2)
    assert [row["generated_text"] for row in rows] == expected
    (row,) = vlm(images=images[:1], text=texts[0], max_new_tokens=2)
    assert row["generated_text"] == expected[0]


def test_a_picture_is_read_when_it_is_asked_for(vlm, source, tmp_path):
    """One whose file is gone, but open; and of one that is closed or cut it is said so."""
    source[0].image.resize((90, 90)).save(tmp_path / "a.png")
    gone, cut, closed = tmp_path / "gone.png", tmp_path / "cut.png", Image.new("RGB", (4, 4))
    gone.write_bytes((tmp_path / "a.png").read_bytes())
    cut.write_bytes((tmp_path / "a.png").read_bytes()[:3000])
    with Image.open(gone) as picture, Image.open(tmp_path / "a.png") as kept:
        gone.unlink()
        same = [vlm.generate(each, "?", max_new_tokens=2).text for each in (picture, kept)]
    assert same[0] == same[1]
    closed.close()
    with Image.open(cut) as torn:
        for image, why in ((closed, "closed image"), (torn, "truncated")):
            with pytest.raises(InputError, match=f"image of query '0' cannot be decoded .*{why}"):
                vlm.generate(image, "?")
    with Image.open(cut) as torn, pytest.raises(InputError, match=r"image of query 'q' cannot be decoded .*truncated"):
        vlm.backbone.encode([type(source[0])("q", torn, "?")])
