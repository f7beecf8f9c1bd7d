"""What is asked of a VLM's files before any of them is loaded, for they may be anybody's: that they bring no code and
no pickle, and that their weights are of the sizes that their config claims."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import AutoModelForImageTextToText, PreTrainedConfig
from transformers.utils.hub import cached_file
from transformers.utils.peft_utils import find_adapter_config_file

from maskgym.backbones.families import FAMILIES
from maskgym.common.errors import InputError, first_line
from maskgym.common.plain_files import read_json
from maskgym.common.tensor_files import tensor_shapes

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"


def check_files(where: str | Path, name: str) -> None:
    """Refuse a VLM by its config and the names of its files.

    Args:
        where: folder or hub id.
        name: of the backbone, in messages.

    Raises:
        InputError: an architecture that no family covers, code of its own, adapters of another VLM, or weights that are
            not safetensors files beside the config.
        OSError, ValueError: files that cannot be read.
    """
    fields, _ = PreTrainedConfig.get_config_dict(where)
    if "auto_map" in fields:
        raise InputError(
            f"backbone {name!r} brings code of its own (auto_map in its config), which is never run; give a "
            "checkpoint that stock transformers loads without it"
        )
    if "model_type" not in fields:
        raise ValueError("no config.json that names a model_type")
    kind = fields["model_type"]
    if kind not in FAMILIES:
        raise InputError(f"backbone {name!r} has architecture {kind!r}; supported: {', '.join(sorted(FAMILIES))}")
    kernels = [value for key, value in _entries(fields) if "attn_implementation" in key and "/" in str(value)]
    if kernels:
        raise InputError(
            f"backbone {name!r} asks for attention kernels of a repository, {kernels[0]!r}, which are never run; "
            "remove that entry from its config"
        )
    if find_adapter_config_file(str(where)) is not None:
        raise InputError(
            f"backbone {name!r} needs adapters within adapters, or on the hub; merge them into their model first"
        )
    for file in _shards(where):
        if "/" in file or "\\" in file or not file.endswith(".safetensors"):
            raise InputError(
                f"backbone {name!r} names weights in {file!r}; they must be safetensors files beside {INDEX}: save the "
                "model again, with save_pretrained"
            )
    if isinstance(where, Path) and not ((where / WEIGHTS).is_file() or (where / INDEX).is_file()):
        raise InputError(
            f"backbone {name!r} has no {WEIGHTS}; weights in other formats can run code and are not taken: load it "
            "with transformers where it comes from, and save it with save_pretrained"
        )


def check_sizes(config: Any, folder: Path, name: str) -> None:
    """Refuse a config whose model is larger than the weights beside it, before memory is taken for it.

    Args:
        config: of the model.
        folder: with its weights.
        name: of the backbone, in messages.

    Raises:
        InputError: unreadable weights, or fewer of them than the config claims.
    """
    files = [folder / file for file in _shards(folder)] or [folder / WEIGHTS]
    try:
        tensors = sum(len(tensor_shapes(file)) for file in files)
        layers = sum(value for key, value in _entries(config.to_dict()) if key in ("num_hidden_layers", "depth"))
        if layers <= tensors:  # each has some; a million of them would take memory even without their weights
            with torch.device("meta"):
                claimed = sum(weight.numel() for weight in AutoModelForImageTextToText.from_config(config).parameters())
            if claimed <= sum(file.stat().st_size for file in files):  # a weight takes a byte at least
                return
    except (OSError, ValueError, TypeError, RuntimeError, OverflowError, SafetensorError) as error:
        raise InputError(f"backbone {name!r} could not be loaded ({first_line(error)})") from error
    raise InputError(f"backbone {name!r} claims a larger model in its config than its weights are; fetch it again")


def _shards(where: str | Path) -> list[str]:
    """Names of the files that a VLM's weights are spread over; none if it has no index."""
    index = cached_file(
        where,
        INDEX,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,  # what is in the cache may do without it
    )
    if index is None or (isinstance(where, Path) and (where / WEIGHTS).is_file()):
        return []
    fields = read_json(Path(index))
    return sorted({str(file) for file in dict(fields["weight_map"]).values()})


def _entries(fields: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """All entries of a config and of the configs within it."""
    for key, value in fields.items():
        yield key, value
        if isinstance(value, dict):
            yield from _entries(value)
