"""What every command shares: options from a dataclass and YAML, and one clear line for bad input."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import math
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
import tyro
from tqdm import tqdm

from backbones import Backbone, load_backbone
from backbones.errors import InputError as InputError
from backbones.plain_files import read_yaml, write_atomically
from eval.runs import RunFolder, check_place

ConfigT = TypeVar("ConfigT")

FRAME, RULE = str.maketrans(dict.fromkeys("│╭╮╰╯", " ")), re.compile("[─-]{10,}")
"""What tyro draws around messages, and between their paragraphs."""


@dataclasses.dataclass(kw_only=True)
class Placement:
    """Options of every command that runs a VLM."""

    device: Literal["cpu", "cuda"] = "cpu"
    """Where the VLM and the controller run."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Of the VLM's weights; the controller stays in float32."""

    def load(self, backbone: str) -> Backbone:
        """The backbone, there and so."""
        return load_backbone(backbone, getattr(torch, self.dtype), self.device)


def run(main: Callable[[], None]) -> None:
    """Run a command; bad input ends it with status 2 and one line on standard error."""
    try:
        main()
    except InputError as error:
        for bar in list(tqdm._instances):  # type: ignore[attr-defined]  # it would stand behind an unfinished one
            bar.close()
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        raise SystemExit(2) from None


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
        given = _as_arguments(_read_yaml(file), config, str(file))
        del arguments[place : place + 2]
    options: Any = read_options(config, [*given, *arguments])
    if getattr(options, "resume", False) and RunFolder(options.out).is_run():
        begun = _as_arguments(RunFolder(options.out).config(), config, str(options.out))
        options = read_options(config, [*begun, *given, *arguments])
    return options


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
    _, told, *_ = RULE.split(" ".join(framed.translate(FRAME).split()))
    return told.partition("Got errors:")[0].strip(" .")


def _check_numbers(option: str, value: Any, of_seeds: bool) -> None:
    for number in value if isinstance(value, tuple) else (value,):
        if isinstance(number, float) and not math.isfinite(number):
            raise InputError(f"{option} is {number}; it must be a finite number")
        if of_seeds and not 0 <= number < 2**32:
            raise InputError(f"{option} is {number}; a seed must be at least 0, and below 2^32")


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        fields = read_yaml(path)
    except FileNotFoundError as error:
        raise InputError(f"config {str(path)!r} does not exist; name a YAML file of options") from error
    except (OSError, ValueError) as error:
        raise InputError(f"config {str(path)!r} is not readable YAML ({error}); mend it, or name another") from error
    if not isinstance(fields, dict):
        raise InputError(f"config {str(path)!r} must hold a mapping of options, as in `seed: 1`")
    return fields


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
    if any(isinstance(item, dict | list) for item in values):  # maybe of immense length: aliases of aliases
        raise InputError(f"config {where!r} has a mapping or nested lists as {name}; give a value or a flat list")
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
        write_atomically(path, (json.dumps(rows, indent=2) + "\n").encode())
