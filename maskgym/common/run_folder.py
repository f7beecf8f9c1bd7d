"""Run folders: what a run was, what it measured, and what it made."""

from __future__ import annotations

import dataclasses
import fcntl
import json
import os
import platform
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import yaml

from maskgym.common.atomic import cannot_write, temporary, write_atomically, write_json, write_text
from maskgym.common.errors import InputError
from maskgym.common.plain_files import check_inside, check_regular, is_number, parse_json, read_config

PACKAGES = ("maskgym", "torch", "transformers", "gymnasium", "stable-baselines3", "datasets", "numpy", "safetensors")

CONFIG, COMMAND, METRICS, TIMING = "config.yaml", "command.txt", "metrics.jsonl", "timing.jsonl"
RESULT = "result.json"

LINE_NUMBERS = ("queries", "step", "reward", "seconds", "update_seconds", "peak_memory_mb")
"""Fields of lines that are numbers, where they are there."""

TIMED = ("queries", "seconds", "peak_memory_mb")
"""Fields of every line of timing."""

NOT_OF_RUN = ("out", "resume", "wandb", "group", "device", "workers", "reward_seconds")
"""Options that say where and how to run, not what the run is; they may differ when it is resumed."""

MAY_CHANGE = ("max_failed", "patience")
"""Options of a run that another value may be given for when it is resumed."""


class RunFolder:
    """The folder of one run: ``config.yaml, command.txt, environment.json, metrics.jsonl, timing.jsonl, result.json``.

    Args:
        path: the folder.

    Attributes:
        other_length: the option that says how long the run goes on, and its new value, where it is taken up for longer
            (or for less) than it was begun for.
    """

    def __init__(self, path: Path | str):
        self.path = Path(path)
        self.other_length: tuple[str, int] | None = None

    @classmethod
    def create(cls, path: Path | str, config: Any, resume: bool = False) -> RunFolder:
        """Make the folder, or take up an earlier run's. The option that ``config.LENGTH`` names, if it has that, may be
        another then; ``change_length`` writes it down.

        Raises:
            InputError: the path is taken by something else, by a finished or unfinished run without ``resume``,
                by a run of another config or one that has gone further, or by one that is going on; it has links out of
                it, or what is no file; or nothing can be written there.
        """
        check_place(Path(path))
        folder = cls(path)
        fields = {name: value for name, value in _plain(dataclasses.asdict(config)).items() if name not in NOT_OF_RUN}
        if folder.path.exists() and not folder.path.is_dir():
            raise InputError(f"output {str(path)!r} is a file; choose another --out")
        if folder._is_begun():
            if not folder.is_run():
                raise InputError(f"output {str(path)!r} exists and is not a run folder; choose another --out")
            if not resume:
                raise InputError(f"output {str(path)!r} holds a run already; add --resume, or choose another --out")
            folder._check_entries()
            folder._take_up(fields, getattr(config, "LENGTH", None))
        else:
            make_folder(folder.path)
            folder._write_config(fields)
        folder._say_how()
        folder._hold()
        return folder

    @classmethod
    @contextmanager
    def begun(cls, path: Path | str, config: Any, resume: bool = False) -> Iterator[RunFolder]:
        """``create`` for the time of a training. Bad input that ends it before its first line of metrics leaves nothing
        behind, so that the mended command finds the place free.

        Raises:
            InputError: as ``create``.
        """
        missing = check_place(Path(path))
        new = not cls(path).is_run()
        folder = cls.create(path, config, resume)
        try:
            yield folder
        except InputError:
            if new and not any(folder.checkpoints.glob("*-*")) and not folder.metrics():
                for entry in folder.path.iterdir():
                    shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
                with suppress(OSError):  # a folder that others use by now
                    for place in missing:
                        place.rmdir()
            raise

    def _take_up(self, fields: dict[str, Any], length: str | None) -> None:
        """Hold the options of a run against those that it was begun with.

        Raises:
            InputError: others, but for the ``length``; or one that the run is beyond.
        """
        begun = self.config()
        may_change = (*MAY_CHANGE, length)
        changed = [key for key, value in begun.items() if fields.get(key, value) != value and key not in may_change]
        if changed:
            raise InputError(
                f"output {str(self.path)!r} was begun with {changed[0]}={begun[changed[0]]!r}, now "
                f"{fields[changed[0]]!r}; resume with the same options, or choose another --out"
            )
        if length is None or begun.get(length, fields[length]) == fields[length]:
            return
        if fields[length] < self.done():
            raise InputError(
                f"--{length.replace('_', '-')} is {fields[length]}, but {self.done()} are done in {str(self.path)!r}; "
                "give at least so many, or choose another --out"
            )
        self.other_length = length, fields[length]

    def done(self) -> int:
        """How many queries, or steps, the newest checkpoint comes after."""
        numbers = [path.name.rpartition("-")[2] for path in self.checkpoints.glob("*-*")]
        return max((int(number) for number in numbers if number.isdecimal()), default=0)

    def change_length(self) -> None:
        """Write down, and say, that the run goes on for longer (or for less) than it was begun for, if it does. What it
        came to before is not its result any more.

        Raises:
            InputError: nothing can be written there.
        """
        if self.other_length is None:
            return
        (name, number), begun = self.other_length, self.config()
        what = name.removeprefix("total_")
        change = f"{number} {what} in place of {begun.get(name)}, from {self.done()} on"
        try:
            os.write(self._held, os.fsencode(f"{command_line()}  # {change}\n"))
            (self.path / RESULT).unlink(missing_ok=True)
        except OSError as error:
            raise cannot_write(self.path, error) from error
        self._write_config({**begun, name: number})
        self.other_length = None
        print(f"{change}; the learning rate goes on as if {number} had been asked for at first")

    def is_finished(self) -> bool:
        """Whether the run has come to its result, and is not to go on."""
        return os.path.isfile(self.path / RESULT) and self.other_length is None

    def _is_begun(self) -> bool:
        """Whether anything is there, but for what a run leaves that was killed before it had written its config."""
        leftover = temporary(self.path / CONFIG)
        return self.path.exists() and any(path != leftover for path in self.path.iterdir())

    def _check_entries(self) -> None:
        """Before a run that may be anybody's is written to.

        Raises:
            InputError: a link that leads out of the folder, or what is neither a file nor a folder.
        """
        for path in self._entries():
            check_inside(path, self.path)
            if path.exists() and not (path.is_file() or path.is_dir()):
                raise InputError(f"{str(path)!r} is no regular file; remove it")
        for name in (CONFIG, COMMAND, METRICS, TIMING):
            self._readable(name)

    def _entries(self) -> Iterator[Path]:
        """What is in the folder, and then what is below its folders that trainings write to."""
        yield from self.path.iterdir()
        for part in (self.checkpoints, self.model):
            yield from part.rglob("*")

    def _readable(self, name: str) -> Path:
        """A file of the run.

        Raises:
            InputError: a link that leads out of the folder, or no regular file.
        """
        file = self.path / name
        check_inside(file, self.path)
        try:
            check_regular(file)
        except ValueError as error:
            raise InputError(f"{str(file)!r} cannot be read ({error}); restore or remove it") from error
        return file

    def _write_config(self, fields: dict[str, Any]) -> None:
        write_text(self.path / CONFIG, yaml.safe_dump(fields, sort_keys=False))

    def _say_how(self) -> None:
        """Write down command and environment, unless an earlier attempt has."""
        command, versions = self.path / COMMAND, self.path / "environment.json"
        if not command.exists():
            write_atomically(command, os.fsencode(command_line() + "\n"))
        if not versions.exists():
            write_json(versions, environment())

    def _hold(self) -> None:
        """Lock the folder until this process ends, however it ends: two trainings would write into each other.

        Raises:
            InputError: another process has it.
        """
        # left open, for closing it would unlock
        self._held = os.open(self.path / COMMAND, os.O_RDWR | os.O_APPEND)
        with suppress(OSError):  # a file system without locks
            try:
                fcntl.lockf(self._held, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except (BlockingIOError, PermissionError) as error:
                raise InputError(
                    f"output {str(self.path)!r} is in use by another process; let it end, or choose another --out"
                ) from error

    def is_run(self) -> bool:
        return os.path.isfile(self.path / CONFIG)

    def config(self) -> dict[str, Any]:
        """The resolved config that the run was begun with.

        Raises:
            InputError: not a run folder, or an unreadable config.
        """
        if not self.is_run():
            raise InputError(f"{str(self.path)!r} is not a run folder (no config.yaml)")
        return read_config(self._readable(CONFIG))

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def model(self) -> Path:
        """A backbone that was trained in this run."""
        return self.path / "model"

    def backbone(self) -> str:
        """The backbone that the run's controller is for: the one trained in it, else the one that its config names.

        Raises:
            InputError: not a run folder, an unreadable config, or one that names no backbone.
        """
        check_inside(self.model, self.path)
        if self.model.exists():
            return str(self.model)
        name = self.config().get("backbone", "tiny")
        if not isinstance(name, str):
            kind = type(name).__name__
            raise InputError(
                f"{str(self.path / 'config.yaml')!r} has a {kind} as backbone; it must be a name or a path"
            )
        return name

    def log(self, **metrics: Any) -> None:
        """Append one line to ``metrics.jsonl``."""
        self._append(METRICS, metrics)

    def log_timing(self, **timing: Any) -> None:
        """Append one line to ``timing.jsonl``: what differs from run to run of the same seed."""
        self._append(TIMING, timing)

    def metrics(self) -> list[dict[str, Any]]:
        """The lines of ``metrics.jsonl``.

        Raises:
            InputError: a line that is no JSON object, or lacks numbers where these belong.
        """
        return self._lines(METRICS)

    def timing(self) -> list[dict[str, Any]]:
        """The lines of ``timing.jsonl``.

        Raises:
            InputError: as ``metrics``.
        """
        return self._lines(TIMING, TIMED)

    def truncate_metrics(self, keep: int) -> None:
        """Drop the lines, of metrics and timing, that a killed run wrote after its last checkpoint."""
        for name in (METRICS, TIMING):
            if (self.path / name).exists():
                self._rewrite(name, self._lines(name)[:keep])

    def drop_metrics_after(self, step: int) -> None:
        """Drop the lines of later steps than the one that a run resumes from."""
        self._rewrite(METRICS, [line for line in self.metrics() if line.get("step", 0) <= step])

    def _append(self, name: str, line: dict[str, Any]) -> None:
        """Add a line; what a full disk has torn of one has no end, and does not count.

        Raises:
            InputError: it cannot be written.
        """
        try:
            with (self.path / name).open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
                file.flush()
                os.fsync(file.fileno())  # checkpoints count the lines before them
        except OSError as error:
            raise cannot_write(self.path / name, error) from error

    def _lines(self, name: str, needed: Sequence[str] = ()) -> list[dict[str, Any]]:
        """A line counts when it has its end: what comes after the last end, a crash has torn."""
        file = self._readable(name)
        try:
            lines = file.read_bytes().split(b"\n")[:-1] if file.exists() else []
        except OSError as error:
            raise InputError(f"{str(file)!r} cannot be read ({error.strerror}); restore or remove it") from error
        return [_parsed(line, f"{str(file)!r}, line {number}", needed) for number, line in enumerate(lines, 1)]

    def _rewrite(self, name: str, lines: Sequence[dict[str, Any]]) -> None:
        write_text(self.path / name, "".join(json.dumps(line) + "\n" for line in lines))

    def write_result(self, records: Sequence[dict[str, Any]]) -> None:
        write_json(self.path / RESULT, list(records))


def _parsed(line: bytes, where: str, needed: Sequence[str]) -> dict[str, Any]:
    try:
        fields = parse_json(line)
    except ValueError as error:
        raise InputError(f"{where}, is not JSON ({error}); mend or remove the line") from error
    if not isinstance(fields, dict):
        raise InputError(f"{where}, is {fields!r:.40}, not an object; mend or remove the line")
    if "reward" in fields or "validation" in fields:
        needed = (*needed, "queries")
    for name in needed:
        if name not in fields:
            raise InputError(f"{where}, lacks {name!r}; mend or remove the line")
    for name in LINE_NUMBERS:
        if name in fields and not is_number(fields[name]):
            raise InputError(f"{where}, has {name}: {fields[name]!r:.40}, not a number; mend or remove the line")
    if "validation" in fields and not _is_validation(fields["validation"]):
        shown = f"{fields['validation']!r:.40}"
        raise InputError(f"{where}, has validation: {shown}, not accuracies by budget; mend or remove the line")
    return fields


def _is_validation(found: Any) -> bool:
    by_budget = list(found.values()) if isinstance(found, dict) else []
    return bool(by_budget) and all(isinstance(own, dict) and is_number(own.get("accuracy")) for own in by_budget)


def check_place(path: Path) -> list[Path]:
    """The folders, deepest first, that are missing for something to be written there: looked for before the work, not
    after it.

    Raises:
        InputError: a path that cannot be, or whose nearest folder is a file or may not be written to.
    """
    try:
        missing = [place for place in (path, *path.parents) if not place.exists()]
    except (OSError, ValueError) as error:  # a name that is too long, say, or has a null character
        reason = error.strerror if isinstance(error, OSError) else error
        raise InputError(f"output {str(path)!r} cannot be made ({reason}); choose another place") from error
    nearest = missing[-1].parent if missing else path
    if missing and not (nearest.is_dir() and os.access(nearest, os.W_OK)):
        problem = "may not be written to" if nearest.is_dir() else "is a file"
        raise InputError(f"output {str(path)!r} cannot be made: {str(nearest)!r} {problem}; choose another place")
    return missing


def make_folder(path: Path) -> None:
    """A folder, with those above it, if there is none.

    Raises:
        InputError: a place where it cannot be, or whose name safetensors would not find again.
    """
    check_place(path)
    try:
        os.fsencode(path.absolute()).decode()
        path.mkdir(parents=True, exist_ok=True)
    except UnicodeError as error:
        raise InputError(f"output {str(path)!r} cannot be made (no UTF-8); choose another place") from error
    except OSError as error:
        raise cannot_write(path, error) from error


def command_line() -> str:
    """The command of this process, as somebody else would type it in the repository."""
    if sys.argv[0].startswith("maskgym "):  # the console command, wherever it is installed
        return shlex.join([*sys.argv[0].split(), *sys.argv[1:]])
    module = getattr(sys.modules["__main__"], "__spec__", None)  # of `python -m`, which puts a full path in argv
    program = [sys.argv[0]] if module is None else ["-m", module.name.removesuffix(".__main__")]
    return shlex.join([Path(sys.executable).name, *program, *sys.argv[1:]])


def environment() -> dict[str, Any]:
    """Versions, platform and git revision."""
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = "not installed"
    return {"python": platform.python_version(), "platform": platform.platform(), "git": _revision(), **versions}


def _revision() -> str:
    root = Path(__file__).parent.parent.parent
    try:
        done = subprocess.run(
            ["git", "describe", "--always", "--dirty"], cwd=root, capture_output=True, timeout=10, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return "unknown"
    return done.stdout.decode(errors="replace").strip() or "unknown"


def _plain(value: Any) -> Any:
    """Tuples as lists and paths as strings, for YAML."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return str(value) if isinstance(value, Path) else value
