"""What every command shares: options from a dataclass and YAML, and one clear line for bad input."""

from __future__ import annotations

import dataclasses
import json
import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
import tyro

from backbones import Backbone, load_backbone
from backbones.atomic import write_atomically
from backbones.errors import InputError as InputError
from eval.runs import RunFolder, read_options
from eval.stopping import Stopped, StopSignals

ConfigT = TypeVar("ConfigT")


RESUME = "go on with the same command and --resume"
"""How a training that was stopped continues."""


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


def run(main: Callable[[], None], go_on: str = "begin anew") -> None:
    """Run a command. Bad input ends it with status 2 and one line on standard error, SIGINT and SIGTERM with the
    statuses 130 and 143 and one line that says how to ``go_on``."""
    with StopSignals():
        try:
            main()
        except InputError as error:
            print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
            raise SystemExit(2) from None
        except Stopped as stopped:
            print(f"{stopped}; {go_on}", file=sys.stderr)
            raise SystemExit(stopped.status) from None


def parse(config: type[ConfigT], arguments: Sequence[str] | None = None) -> ConfigT:
    """Options of the dataclass ``config`` from the command line, over those of ``--config FILE.yaml``.

    With ``--resume`` they go over the options that the run in ``--out`` was begun with.

    Raises:
        InputError: a YAML file that is missing, unreadable, or has unknown options.
    """
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    defaults: dict[str, Any] = {}
    if "--config" in arguments:
        place = arguments.index("--config")
        if place + 1 == len(arguments):
            raise InputError("--config needs the path of a YAML file")
        defaults = _fields(read_options(Path(arguments[place + 1])), config, arguments[place + 1])
        del arguments[place : place + 2]
    options: Any = tyro.cli(config, args=arguments, default=config(**defaults))
    if getattr(options, "resume", False) and RunFolder(options.out).is_run():
        begun = _fields(RunFolder(options.out).config(), config, str(options.out))
        resumed = tyro.cli(config, args=arguments, default=config(**{**begun, **defaults}))
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


def _fields(fields: dict[str, Any], config: Any, where: str) -> dict[str, Any]:
    known = {field.name for field in dataclasses.fields(config)}
    unknown = sorted(set(fields) - known)
    if unknown:
        raise InputError(f"config {where!r} has the unknown option {unknown[0]!r}; known: {', '.join(sorted(known))}")
    return {key: tuple(value) if isinstance(value, list) else value for key, value in fields.items()}


def check_output(option: str, path: Path | None) -> None:
    """Before the work, not after it.

    Raises:
        InputError: a file that cannot be written for want of a folder.
    """
    if path is not None and (path.is_dir() or not path.parent.is_dir()):
        problem = "is a folder" if path.is_dir() else f"has no folder {str(path.parent)!r} to lie in"
        raise InputError(f"{option} {str(path)!r} {problem}; name a file in a folder that exists")


def write_json(path: Path | None, rows: list[dict[str, object]]) -> None:
    if path is not None:
        write_atomically(path, (json.dumps(rows, indent=2) + "\n").encode())
