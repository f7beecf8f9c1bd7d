"""Checkpoints without pickle: tensors as safetensors, the rest as JSON, each checkpoint a folder that appears whole."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from backbones.errors import InputError
from backbones.plain_files import MALFORMED, read_json


def save_checkpoint(folder: Path, step: int, tensors: dict[str, Tensor], state: dict[str, Any], keep: int = 2) -> None:
    """Write ``folder/step-N`` and remove all but the newest ``keep`` checkpoints."""
    folder.mkdir(parents=True, exist_ok=True)
    unfinished, finished = folder / "unfinished", folder / f"step-{step:09d}"
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir()
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, unfinished / "tensors.safetensors")
    (unfinished / "state.json").write_text(json.dumps(state))
    shutil.rmtree(finished, ignore_errors=True)
    unfinished.rename(finished)
    for old in sorted(folder.glob("step-*"))[:-keep]:
        shutil.rmtree(old)


def load_checkpoint(folder: Path) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
    """The newest checkpoint's tensors and state, or None if there is none.

    Raises:
        InputError: a checkpoint that cannot be read.
    """
    found = sorted(folder.glob("step-*"))
    if not found:
        return None
    try:
        return load_file(found[-1] / "tensors.safetensors"), read_json(found[-1] / "state.json")
    except Exception as error:  # safetensors and json raise many kinds
        raise InputError(
            f"checkpoint {str(found[-1])!r} cannot be read ({error}); remove it to use the one before"
        ) from error


@contextmanager
def restoring(folder: Path) -> Iterator[None]:
    """While a checkpoint of ``folder`` is taken up.

    Raises:
        InputError: what it holds does not fit the run.
    """
    try:
        yield
    except InputError:
        raise
    except (RuntimeError, *MALFORMED) as error:
        reason = str(error).strip().splitlines()[-1].strip()
        raise InputError(
            f"the checkpoint in {str(folder)!r} does not fit this run ({reason}); remove it to use the one before, or "
            "begin anew"
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
