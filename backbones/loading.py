"""``load_backbone``: a backbone by name, hub id or path."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForImageTextToText

from backbones.backbone import Backbone
from backbones.errors import InputError
from backbones.families import FAMILIES
from backbones.plain_files import MALFORMED, read_json
from backbones.processing import load_processor
from backbones.tiny import TINY_FOLDER


def load_backbone(
    name: str = "tiny",
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    **options: Any,
) -> Backbone:
    """Load a backbone in evaluation mode, its weights frozen.

    Args:
        name: ``"tiny"`` (embedded), a local folder, or a hub id such as ``"llava-hf/llava-1.5-7b-hf"``. A folder of
            LoRA adapters, as ``train_backbone.py`` saves them, is merged into the model it was trained on.
        dtype: of the weights.
        device: where to run.
        **options: of ``Backbone``: ``heads``, ``width``, ``protected_layers``, ``max_visual_tokens``, …

    Raises:
        InputError: nothing loadable under that name, an architecture that no family covers, or a device that
            isn't there.
    """
    folder = TINY_FOLDER if name == "tiny" else Path(name)
    looks_local = name == "tiny" or os.path.exists(folder) or name.startswith((".", "/", "~"))
    where: str | Path = folder if looks_local else name
    if not looks_local and "/" not in name:
        raise InputError(f"unknown backbone {name!r}; use 'tiny', a folder, or a hub id like 'owner/model'")
    check_placement(dtype, device)
    if looks_local and not os.path.isdir(folder.expanduser()):
        problem = "it is a file" if os.path.isfile(folder) else "there is no such folder"
        raise InputError(f"backbone {name!r} could not be read ({problem}); check the folder")
    adapters = where
    where = _base_of(where, name)
    try:
        config = AutoConfig.from_pretrained(where)
    except (OSError, ValueError, KeyError) as error:
        reason = str(error).strip().splitlines()[0]
        remedy = "check the folder" if looks_local else how_to_fetch(name)
        raise InputError(f"backbone {name!r} could not be read ({reason}); {remedy}") from error
    family = FAMILIES.get(config.model_type)
    if family is None:
        raise InputError(
            f"backbone {name!r} has architecture {config.model_type!r}; supported: {', '.join(sorted(FAMILIES))}"
        )
    try:
        model: Any = AutoModelForImageTextToText.from_pretrained(where, dtype=dtype)
        processor = load_processor(where)
        if adapters != where:
            from peft import PeftModel  # takes seconds to import, and few need it

            model = PeftModel.from_pretrained(model, adapters).merge_and_unload()
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        reason = str(error).strip().splitlines()[0]
        raise InputError(f"backbone {name!r} could not be loaded ({reason})") from error
    model.requires_grad_(False)
    return Backbone(family(model.to(device).eval(), processor), name, **options)


def _base_of(where: str | Path, name: str) -> str | Path:
    """Where the weights are: the place itself, or, if it holds adapters, the model that they were trained on."""
    if not isinstance(where, Path) or not (where / "adapter_config.json").is_file():
        return where
    try:
        base = str(read_json(where / "adapter_config.json")["base_model_name_or_path"])
    except MALFORMED as error:
        raise InputError(
            f"backbone {name!r} has an unreadable adapter_config.json ({error!r}); save the adapters again"
        ) from error
    return TINY_FOLDER if base == "tiny" else base


def how_to_fetch(hub_id: str) -> str:
    """What to do where the hub cannot be reached."""
    return (
        f"check the hub id; without network here, run `hf download {hub_id} --local-dir FOLDER` elsewhere and give the "
        "path of that folder"
    )


def check_placement(dtype: torch.dtype, device: torch.device | str) -> None:
    """Refuse a dtype that is none and a device that is not there.

    Raises:
        InputError: naming it.
    """
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise InputError(f"dtype is {dtype!r}; it must be a torch dtype of floating point, such as torch.float32")
    try:
        kind = torch.device(device).type
    except RuntimeError as error:
        raise InputError(f"device {device!r} is not one that torch knows; use 'cpu' or 'cuda'") from error
    if kind == "cuda" and not torch.cuda.is_available():
        raise InputError(f"device {device!s} is not there (no CUDA in this process); use device='cpu'")
