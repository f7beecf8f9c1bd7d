"""Checkpoints without pickle: tensors as safetensors, the rest as JSON, each checkpoint a folder that appears whole."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from maskgym.common.atomic import remove_at_once, whole_folder
from maskgym.common.errors import InputError, first_line
from maskgym.common.plain_files import read_json


def save_checkpoint(folder: Path, step: int, tensors: dict[str, Tensor], state: dict[str, Any], keep: int = 2) -> None:
    """Write ``folder/step-N`` and remove all but the newest ``keep`` checkpoints.

    A step that has one keeps it: runs continue exactly, so what would be written leads to the same.
    """
    finished = folder / f"step-{step:09d}"
    if not finished.exists():
        with whole_folder(finished) as unfinished:
            named = {name: tensor.contiguous() for name, tensor in tensors.items()}
            save_file(named, unfinished / "tensors.safetensors")
            (unfinished / "state.json").write_text(json.dumps(state), encoding="utf-8")
    for old in written(folder)[:-keep]:
        remove_at_once(old)


def written(folder: Path) -> list[Path]:
    """The checkpoints in a folder, the newest last."""
    return sorted(folder.glob("step-*"))


def load_checkpoint(folder: Path) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
    """The newest checkpoint's tensors and state, or None if there is none.

    Raises:
        InputError: a checkpoint that cannot be read.
    """
    found = written(folder)
    if not found:
        return None
    with reading_newest(found) as newest:
        return load_file(newest / "tensors.safetensors"), read_json(newest / "state.json")


def restoring(folder: Path) -> AbstractContextManager[Path]:
    """While the newest checkpoint, loaded, is taken up by a run that it may not fit."""
    return reading_newest(written(folder), "does not fit this run")


@contextmanager
def reading_newest(found: Sequence[Path], problem: str = "cannot be read") -> Iterator[Path]:
    """The last of some checkpoints, for the block to read or to take up.

    Raises:
        InputError: it has that ``problem``; the message says what to do.
    """
    try:
        yield found[-1]
    except InputError:
        raise
    except Exception as error:  # safetensors, json and torch raise many kinds
        then = "use the one before" if len(found) > 1 else "begin anew"
        raise InputError(
            f"checkpoint {str(found[-1])!r} {problem} ({first_line(error)}); remove it to {then}"
        ) from error


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """An optimiser's state as flat named tensors."""
    states = optimizer.state_dict()["state"]
    return {f"optimizer.{index}.{name}": value for index, state in states.items() for name, value in state.items()}


def restore_optimizer(optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    """Put back what ``optimizer_tensors`` named; the other entries are left alone."""
    states: dict[int, dict[str, Tensor]] = {}
    for name, value in tensors.items():
        if name.startswith("optimizer."):
            _, index, field = name.split(".", 2)
            states.setdefault(int(index), {})[field] = value
    optimizer.load_state_dict({"state": states, "param_groups": optimizer.state_dict()["param_groups"]})


def random_state() -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The states of the global random generators that training draws from: torch's, and NumPy's legacy one."""
    kind, keys, place, has_gauss, cached = np.random.get_state(legacy=True)
    tensors = {"random.torch": torch.get_rng_state(), "random.numpy": torch.from_numpy(np.asarray(keys, np.int64))}
    return tensors, {"kind": str(kind), "place": int(place), "has_gauss": int(has_gauss), "cached": float(cached)}


def restore_random_state(tensors: dict[str, Tensor], state: dict[str, Any]) -> None:
    torch.set_rng_state(tensors["random.torch"])
    keys = tensors["random.numpy"].numpy().astype(np.uint32)
    np.random.set_state((state["kind"], keys, state["place"], state["has_gauss"], state["cached"]))
