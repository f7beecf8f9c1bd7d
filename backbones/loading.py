"""``load_backbone``: a backbone by name, hub id or path."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForImageTextToText

from backbones.backbone import Backbone
from backbones.errors import InputError, first_line
from backbones.families import FAMILIES
from backbones.foreign import check_files, check_sizes
from backbones.lora import base_of, holds_adapters, merged
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
            LoRA adapters, as ``train_backbone.py`` saves them, is merged into the model it was trained on. Nothing
            in it is run or unpickled.
        dtype: of the weights.
        device: where to run.
        **options: of ``Backbone``: ``heads``, ``width``, ``protected_layers``, ``max_visual_tokens``, …

    Raises:
        InputError: nothing loadable under that name, an architecture that no family covers, files that bring code or
            pickles, or a device that isn't there.
    """
    folder = TINY_FOLDER if name == "tiny" else Path(name)
    looks_local = name == "tiny" or os.path.exists(folder) or name.startswith((".", "/", "~"))
    where: str | Path = folder if looks_local else name
    if not looks_local and "/" not in name:
        raise InputError(f"unknown backbone {name!r}; use 'tiny', a folder, or a hub id like 'owner/model'")
    check_placement(dtype, device)
    if looks_local and not os.path.isdir(os.path.expanduser(folder)):
        problem = "it is a file" if os.path.isfile(folder) else "there is no such folder"
        raise InputError(f"backbone {name!r} could not be read ({problem}); check the folder")
    adapters = where if holds_adapters(where) else None
    if isinstance(adapters, Path):
        base = base_of(adapters, name)
        where = TINY_FOLDER if base == "tiny" else Path(base) if os.path.exists(base) else base
    try:
        check_files(where, name)
        config = AutoConfig.from_pretrained(where, trust_remote_code=False)
    except InputError:
        raise
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        remedy = "check the folder" if looks_local else how_to_fetch(name)
        raise InputError(f"backbone {name!r} could not be read ({first_line(error)}); {remedy}") from error
    if isinstance(where, Path):
        check_sizes(config, where, name)
    try:
        model: Any = AutoModelForImageTextToText.from_pretrained(
            where, dtype=dtype, use_safetensors=True, trust_remote_code=False
        )
        processor = load_processor(where)
        if isinstance(adapters, Path):
            model = merged(model, adapters, name)
    except InputError:
        raise
    except (OSError, ValueError, RuntimeError, ImportError, SafetensorError) as error:
        raise InputError(f"backbone {name!r} could not be loaded ({first_line(error)})") from error
    family = FAMILIES[config.model_type]
    model.requires_grad_(False)
    return Backbone(family(model.to(device).eval(), processor), name, **options)


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
