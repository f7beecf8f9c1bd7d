"""Where ``small`` is put together from its parts, once for each language model and deltas, in the user's cache."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from filelock import FileLock
from tqdm import tqdm

from maskgym.backbones.small import smollm2
from maskgym.backbones.small.build import assemble, build_processor
from maskgym.backbones.small.deltas import apply_deltas, delta_files, digest
from maskgym.common.atomic import cannot_write, whole_folder
from maskgym.common.errors import InputError, first_line

CONVERSION = 1
"""To be raised when the same parts make another model than before."""

NEEDED = 600 * 2**20
"""Bytes of disk that a model takes."""


def cache_home() -> Path:
    """The user's cache of maskgym's: $MASKGYM_CACHE, $XDG_CACHE_HOME/maskgym or ~/.cache/maskgym."""
    if os.environ.get("MASKGYM_CACHE"):
        return Path(os.environ["MASKGYM_CACHE"]).expanduser().absolute()
    home = os.environ.get("XDG_CACHE_HOME", "")  # a relative one is to be ignored, says its specification
    return (Path(home) if os.path.isabs(home) else Path.home() / ".cache") / "maskgym"


def converted(deltas: Path, name: str) -> Path:
    """The folder of the model that deltas make of the published language model, which is made if it is not there.

    Processes that want the same one at once wait for the one that makes it.

    Args:
        deltas: their folder.
        name: of the backbone, in messages.

    Raises:
        InputError: deltas that cannot be applied, a language model that is not there, or no room.
    """
    files = delta_files(deltas, name)
    try:
        made_of = f"{CONVERSION}-{smollm2.SHA256[:8]}-{digest(files)[:16]}"
    except (OSError, ValueError) as error:
        raise InputError(f"backbone {name!r} could not be read ({first_line(error)}); check the folder") from error
    folder = cache_home() / "small" / made_of / "model"
    if folder.is_dir():
        return folder
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(folder.parent / "lock"):
            if not folder.is_dir():
                _make(folder, files, name)
    except OSError as error:
        raise cannot_write(folder, error) from error
    return folder


def _make(folder: Path, files: list[Path], name: str) -> None:
    """Put the model together and save it, with a bar of progress on standard error."""
    path, free = smollm2.find_file(), shutil.disk_usage(folder.parent).free
    if free < NEEDED:
        raise InputError(
            f"{str(folder)!r} needs {NEEDED >> 20} MB of disk, {free >> 20} MB are free; make room, or name another "
            "place in the environment variable MASKGYM_CACHE"
        )
    with tqdm(total=4, desc=f"{Path(name).name}, once", unit="part") as bar, whole_folder(folder) as unfinished:
        processor = build_processor(smollm2.load_tokenizer(path))
        bar.update()
        model = assemble(smollm2.load_language_model(path), processor)
        bar.update()
        apply_deltas(model, files, name)
        bar.update()
        model.save_pretrained(unfinished)
        processor.save_pretrained(unfinished)
        bar.update()
