"""``load_backbone``: a backbone by name, hub id or path."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForImageTextToText

from maskgym.backbones.backbone import Backbone
from maskgym.backbones.errors import InputError, first_line
from maskgym.backbones.families import FAMILIES
from maskgym.backbones.foreign import check_files, check_sizes
from maskgym.backbones.lora import base_of, holds_adapters, merged
from maskgym.backbones.processing import load_processor
from maskgym.backbones.small_cache import converted
from maskgym.backbones.small_deltas import holds_deltas

EMBEDDED = {name: Path(__file__).parent / f"{name}_weights" for name in ("tiny", "small")}
"""The backbones that are shipped with the project."""


def load_backbone(
    name: str = "tiny",
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    **options: Any,
) -> Backbone:
    """Load a backbone in evaluation mode, its weights frozen.

    Args:
        name: ``"tiny"`` or ``"small"`` (embedded), a local folder, or a hub id such as
            ``"llava-hf/llava-1.5-7b-hf"``. A folder of LoRA adapters, as ``train_backbone.py`` saves them, is merged
            into the model it was trained on, one of deltas (``maskgym.backbones.small_deltas``) into SmolLM2. Nothing
            in it is run or unpickled.
        dtype: of the weights.
        device: where to run.
        **options: of ``Backbone``: ``heads``, ``width``, ``protected_layers``, ``max_visual_tokens``, …

    Raises:
        InputError: nothing loadable under that name, an architecture that no family covers, files that bring code or
            pickles, a package that ``small`` needs and that isn't there, or a device that isn't.
    """
    where = place = _place_of(name)
    check_placement(dtype, device)
    if holds_adapters(place):
        where = _base(base_of(Path(place), name))
    if holds_deltas(where):
        where = converted(Path(where), name)
    try:
        check_files(where, name)
        config = AutoConfig.from_pretrained(where, trust_remote_code=False)
    except InputError:
        raise
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        remedy = "check the folder" if isinstance(place, Path) else how_to_fetch(name)
        raise InputError(f"backbone {name!r} could not be read ({first_line(error)}); {remedy}") from error
    if isinstance(where, Path):
        check_sizes(config, where, name)
    try:
        model: Any = AutoModelForImageTextToText.from_pretrained(
            where, dtype=dtype, use_safetensors=True, trust_remote_code=False
        )
        processor = load_processor(where)
        if holds_adapters(place):
            model = merged(model, Path(place), name)
    except InputError:
        raise
    except (OSError, ValueError, RuntimeError, ImportError, SafetensorError) as error:
        raise InputError(f"backbone {name!r} could not be loaded ({first_line(error)})") from error
    family = FAMILIES[config.model_type]
    model.requires_grad_(False)
    return Backbone(family(model.to(device).eval(), processor), name, **options)


def _place_of(name: str) -> str | Path:
    """The folder that a name stands for, or the hub id that it is.

    Raises:
        InputError: neither, or a folder that is not there.
    """
    if name in EMBEDDED:
        return EMBEDDED[name]
    if not os.path.exists(name) and not name.startswith((".", "/", "~")):
        if "/" not in name:
            known = ", ".join(map(repr, EMBEDDED))
            raise InputError(f"unknown backbone {name!r}; use {known}, a folder, or a hub id like 'owner/model'")
        return name
    if not os.path.isdir(os.path.expanduser(name)):
        problem = "it is a file" if os.path.isfile(name) else "there is no such folder"
        raise InputError(f"backbone {name!r} could not be read ({problem}); check the folder")
    return Path(name)


def _base(name: str) -> str | Path:
    """The folder or hub id of the model that adapters were trained on."""
    return EMBEDDED.get(name) or (Path(name) if os.path.exists(name) else name)


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
