"""Files and folders that appear whole: whatever is killed, and when, the old one or the new one is there, never a part.

What is new is written beside its place, flushed to the disk, and renamed; a rename is atomic, and flushing the folder
makes it last. What a kill leaves behind (``*.tmp``, ``.unfinished``, ``.removed``) is overwritten by the next writer.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from maskgym.common.errors import InputError

UNFINISHED, REMOVED = ".unfinished", ".removed"
"""Names, beside a folder, of what will take its place and of what was there."""


def temporary(path: Path) -> Path:
    """Where a file is written before it is renamed."""
    return path.with_name(path.name + ".tmp")


def write_atomically(path: Path, content: bytes) -> None:
    """Write a file so that a crash leaves the old one or the new one, never half of one.

    Raises:
        InputError: a place where it cannot be written.
    """
    try:
        if path.exists() and not path.is_file():  # /dev/stdout, say, is written to, not put another file in its place
            path.write_bytes(content)
            return
        with temporary(path).open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary(path).replace(path)
    except OSError as error:
        with suppress(OSError):
            temporary(path).unlink()
        raise cannot_write(path, error) from error
    sync(path.parent)


def write_text(path: Path, text: str) -> None:
    """Write a text in UTF-8; what is no character (the odd bytes of a file's name) is escaped.

    Raises:
        InputError: a place where it cannot be written.
    """
    write_atomically(path, text.encode(errors="backslashreplace"))


def write_json(path: Path, value: Any) -> None:
    """Write a value as JSON, for people to read, too.

    Raises:
        InputError: a place where it cannot be written.
    """
    write_text(path, json.dumps(value, indent=2) + "\n")


def cannot_write(path: Path, error: OSError | SafetensorError) -> InputError:
    """What to say of a place that nothing can be written to."""
    why = getattr(error, "strerror", None) or error
    return InputError(f"{str(path)!r} cannot be written ({why}); make room, or choose another place")


@contextmanager
def whole_folder(folder: Path) -> Iterator[Path]:
    """An empty folder to fill; when the block ends without an error it takes the place of ``folder``.

    Raises:
        InputError: a place where it cannot be written; what is half written is removed, for the disk may be full.
    """
    unfinished = folder.with_name(UNFINISHED)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir()
        yield unfinished
        put_in_place(unfinished, folder)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise cannot_write(folder, error) from error


def put_in_place(unfinished: Path, folder: Path) -> None:
    """Rename a folder on the same disk, flushed with all that is in it, to ``folder``, which it replaces."""
    for path in [*unfinished.rglob("*"), unfinished]:
        sync(path)
    if folder.exists():
        remove_at_once(folder)
    unfinished.rename(folder)
    sync(folder.parent)


def remove_at_once(folder: Path) -> None:
    """Remove a folder so that a crash leaves all of it under its name, or nothing."""
    removed = folder.with_name(REMOVED)
    shutil.rmtree(removed, ignore_errors=True)
    folder.rename(removed)
    shutil.rmtree(removed)


def sync(path: Path) -> None:
    """Flush a file or a folder to the disk."""
    with suppress(OSError):  # some file systems cannot flush a folder
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
