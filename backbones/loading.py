"""``load_backbone``: a backbone by name, hub id or path."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForImageTextToText

from backbones.backbone import Backbone
from backbones.errors import InputError
from backbones.families import FAMILIES
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
        name: ``"tiny"`` (embedded), a local folder, or a hub id such as ``"llava-hf/llava-1.5-7b-hf"``.
        dtype: of the weights.
        device: where to run.
        **options: of ``Backbone``: ``heads``, ``width``, ``protected_layers``, ``max_visual_tokens``, …

    Raises:
        InputError: nothing loadable under that name, an architecture that no family covers, or a device that
            isn't there.
    """
    folder = TINY_FOLDER if name == "tiny" else Path(name)
    looks_local = name == "tiny" or folder.exists() or name.startswith((".", "/", "~"))
    where: str | Path = folder if looks_local else name
    if not looks_local and "/" not in name:
        raise InputError(f"unknown backbone {name!r}; use 'tiny', a folder, or a hub id like 'owner/model'")
    _check_placement(dtype, device)
    try:
        config = AutoConfig.from_pretrained(where)
    except (OSError, ValueError, KeyError) as error:
        reason = str(error).strip().splitlines()[0]
        raise InputError(f"backbone {name!r} could not be read ({reason}); check the folder or hub id") from error
    family = FAMILIES.get(config.model_type)
    if family is None:
        raise InputError(
            f"backbone {name!r} has architecture {config.model_type!r}; supported: {', '.join(sorted(FAMILIES))}"
        )
    try:
        model: Any = AutoModelForImageTextToText.from_pretrained(where, dtype=dtype)
        processor = load_processor(where)
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        reason = str(error).strip().splitlines()[0]
        raise InputError(f"backbone {name!r} could not be loaded ({reason})") from error
    model.requires_grad_(False)
    return Backbone(family(model.to(device).eval(), processor), name, **options)


def _check_placement(dtype: torch.dtype, device: torch.device | str) -> None:
    if not isinstance(dtype, torch.dtype):
        raise InputError(f"dtype is {dtype!r}; it must be a torch dtype, such as torch.float32")
    try:
        kind = torch.device(device).type
    except RuntimeError as error:
        raise InputError(f"device {device!r} is not one that torch knows; use 'cpu' or 'cuda'") from error
    if kind == "cuda" and not torch.cuda.is_available():
        raise InputError(f"device {device!s} is not there (no CUDA in this process); use device='cpu'")
