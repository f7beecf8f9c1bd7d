"""What every command shares: options from a dataclass and YAML, and one clear line for bad input."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import io
import math
import os
import re
import shlex
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, NoReturn, TextIO, TypeVar

import tyro
from tqdm import tqdm

from maskgym.backbones import Backbone
from maskgym.backbones.loading.load import dtype_name, named_dtype, own_dtype
from maskgym.common import atomic
from maskgym.common.errors import InputError as InputError
from maskgym.common.errors import printable
from maskgym.common.plain_files import read_config
from maskgym.common.run_folder import RunFolder, check_place
from maskgym.common.stopping import Stopped, StopSignals
from maskgym.eval.saved import load_with_options

ConfigT = TypeVar("ConfigT")

FRAME, RULE, COLOUR = str.maketrans(dict.fromkeys("│╭╮╰╯", " ")), re.compile("[─-]{10,}"), re.compile("\x1b\\[[0-9;]*m")
"""What tyro draws around messages, between their paragraphs, and into them where there is a terminal."""

FULL = (errno.ENOSPC, errno.EDQUOT)
"""What writing to a full disk, or beyond a quota, gives, wherever it is."""

UNREAD = 128 + signal.SIGPIPE
"""What shells report of a process whose output nobody reads on."""

RESUME = "go on with the same command and --resume"
"""How a training that was stopped continues."""


@dataclasses.dataclass(kw_only=True)
class Placement:
    """Options of every command that runs a VLM."""

    device: Literal["cpu", "cuda"] = "cpu"
    """Where the VLM and the controller run."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Of the VLM's weights; the controller stays in float32. auto: float32 on the CPU; on a GPU the type that the VLM
    was saved in, or bfloat16 if its config has none."""

    def settle_dtype(self, backbone: str) -> None:
        """Put what ``auto`` means for a backbone in its place, for a config that says what was done.

        Raises:
            InputError: a backbone that cannot be read, or a device that is not there.
        """
        if self.dtype == "auto":
            self.dtype = dtype_name(own_dtype(backbone, self.device))

    def load(self, backbone: str, options: dict[str, Any] | None = None) -> Backbone:
        """The backbone, there and so; with options, if a folder has them."""
        return load_with_options(backbone, options or {}, named_dtype(self.dtype), self.device)


def run(main: Callable[[], None], go_on: str = "begin anew") -> None:
    """Run a command. Bad input and a full disk end it with status 2 and one line on standard error, SIGINT and SIGTERM
    with the statuses 130 and 143 and one line that says how to ``go_on``; output that nobody reads any more, as with
    ``| head``, ends it with the status 141 and no word."""
    _open_streams()
    with StopSignals():
        try:
            try:
                main()
            finally:
                sys.stdout.flush()  # here, not as the interpreter ends, where nobody can be told
        except BrokenPipeError:
            _end(None, UNREAD)
        except InputError as error:
            _end(f"error: {printable(str(error))}", 2)
        except OSError as error:
            if error.errno not in FULL:
                raise
            _end(f"error: {printable(str(error))}; make room, then {go_on}", 2)
        except Stopped as stopped:
            _end(f"{stopped}; {go_on}", stopped.status)


def _open_streams() -> None:
    """Have standard output and error take whatever is written: nowhere, where they are closed, and what their encoding
    has no characters for escaped, in the one as Python does it in the other."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115
        elif isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def _end(line: str | None, status: int) -> NoReturn:
    try:
        for bar in list(tqdm._instances):  # type: ignore[attr-defined]  # the line would stand behind an unfinished one
            bar.close()
        if line is not None:
            print(line, file=sys.stderr, flush=True)
    except BrokenPipeError:
        status = UNREAD
    except OSError:  # a full disk, say: the status alone tells
        pass
    for stream in (sys.stdout, sys.stderr):
        _let_go(stream)
    raise SystemExit(status) from None


def _let_go(stream: TextIO) -> None:
    """Flush a stream; what cannot be written is dropped, or the interpreter would complain of it as it ends."""
    try:
        stream.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def parse(config: type[ConfigT], arguments: Sequence[str] | None = None) -> ConfigT:
    """Options of the dataclass ``config`` from the command line, over those of ``--config FILE.yaml``.

    With ``--resume`` they go over the options that the run in ``--out`` was begun with.

    Raises:
        InputError: an unknown option or a value that it does not take, on the command line or in the YAML file; a YAML
            file that is missing or unreadable.
    """
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    given: list[str] = []
    if "--config" in arguments:
        place = arguments.index("--config")
        if place + 1 == len(arguments):
            raise InputError("--config needs the path of a YAML file")
        file = Path(arguments[place + 1])
        given = _as_arguments(read_config(file), config, str(file))
        del arguments[place : place + 2]
    options: Any = read_options(config, [*given, *arguments])
    if getattr(options, "resume", False) and RunFolder(options.out).is_run():
        begun = _as_arguments(RunFolder(options.out).config(), config, str(options.out))
        resumed = read_options(config, [*begun, *given, *arguments])
        _check_code(resumed, options)
        return resumed
    return options


def _check_code(resumed: Any, asked: Any) -> None:
    """A run folder may be anybody's: code of a user's that it names, a reward by its dotted path, is run only if the
    command names it, too.

    Raises:
        InputError: such code that is named by the folder alone.
    """
    rewards = getattr(resumed, "reward", ())
    unasked = [part for part in rewards if ":" in part and part not in asked.reward]
    if unasked:
        raise InputError(
            f"the run in {str(resumed.out)!r} names code of its own, the reward {unasked[0]!r}; if it is yours, say so "
            f"once more: --resume --reward {shlex.join(rewards)}"
        )


def read_options(config: Any, arguments: Sequence[str] | None = None, **how: Any) -> Any:
    """Options of a dataclass, or of one of several commands, from the command line.

    Args:
        config: what ``tyro.cli`` takes.
        arguments: by default those of this process.
        **how: of ``tyro.cli``.

    Raises:
        InputError: an unknown option, a value that it does not take, a number that is not finite, or a seed
            that NumPy does not take.
    """
    said = io.StringIO()
    tyro._experimental_options["ansi_codes"] = not os.environ.get("NO_COLOR")
    try:
        with contextlib.redirect_stderr(said):
            options = tyro.cli(config, args=arguments, **how)
    except SystemExit as stopped:
        if not stopped.code:  # --help
            raise
        raise InputError(f"{_first_paragraph(said.getvalue())}; --help lists the options") from None
    for name, value in vars(options).items():
        _check_numbers(f"--{name.replace('_', '-')}", value, of_seeds=name in ("seed", "seeds"))
    return options


def _first_paragraph(framed: str) -> str:
    """What is wrong, without the title and the frame around it and the advice below it."""
    _, told, *_ = RULE.split(" ".join(COLOUR.sub("", framed).translate(FRAME).split()))
    return told.partition("Got errors:")[0].strip(" .")


def _check_numbers(option: str, value: Any, of_seeds: bool) -> None:
    for number in value if isinstance(value, tuple) else (value,):
        if isinstance(number, float) and not math.isfinite(number):
            raise InputError(f"{option} is {number}; it must be a finite number")
        if of_seeds and not 0 <= number < 2**32:
            raise InputError(f"{option} is {number}; a seed must be at least 0, and below 2^32")


def _as_arguments(fields: dict[str, Any], config: Any, where: str) -> list[str]:
    """A file's options as the command line would have them: what they take is said in one place.

    Raises:
        InputError: an unknown option, or a value that it does not take; the message names the file.
    """
    known = [field.name for field in dataclasses.fields(config)]
    for name in fields:
        if name not in known:
            raise InputError(f"config {where!r} has the unknown option {name!r}; known: {', '.join(sorted(known))}")
    spelled = {name: _spelled(name, value, where) for name, value in fields.items()}
    arguments = [argument for own in spelled.values() for argument in own]
    try:
        read_options(config, arguments)
    except InputError:
        for name, own in spelled.items():  # which it was
            try:
                read_options(config, own)
            except InputError as error:
                raise InputError(f"config {where!r} has {name}: {fields[name]!r} ({error})") from error
        raise
    return arguments


def _spelled(name: str, value: Any, where: str) -> list[str]:
    """An option of a file on the command line."""
    option, values = name.replace("_", "-"), value if isinstance(value, list) else [value]
    if any(isinstance(item, dict | list) for item in values):
        raise InputError(f"config {where!r} has a mapping or nested lists as {name}; give a value or a flat list")
    if any(str(item).startswith("--") or item == "-h" for item in values):
        raise InputError(f"config {where!r} has {name}: {value!r}; a value is no option of its own")
    if isinstance(value, bool):
        return [f"--{option}" if value else f"--no-{option}"]
    return [f"--{option}", *map(str, values)]


def check_output(option: str, path: Path | None) -> None:
    """Before the work, not after it.

    Raises:
        InputError: a file that cannot be written: it has no folder, or a folder that may not be written to.
    """
    if path is None:
        return
    check_place(path)
    if path.is_dir() or not path.parent.is_dir():
        problem = "is a folder" if path.is_dir() else f"has no folder {str(path.parent)!r} to lie in"
        raise InputError(f"{option} {str(path)!r} {problem}; name a file in a folder that exists")


def write_json(path: Path | None, rows: list[dict[str, object]]) -> None:
    if path is not None:
        atomic.write_json(path, rows)
