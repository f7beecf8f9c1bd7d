"""``load_backbone``: a backbone by name, hub id or path."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForImageTextToText, PretrainedConfig

from maskgym.backbones.backbone import Backbone
from maskgym.backbones.families import FAMILIES
from maskgym.backbones.loading.foreign import check_files, check_sizes
from maskgym.backbones.loading.lora import base_of, holds_adapters, merged
from maskgym.backbones.loading.processing import load_processor
from maskgym.backbones.small.cache import converted
from maskgym.backbones.small.deltas import holds_deltas
from maskgym.common.errors import InputError, first_line

EMBEDDED = {name: Path(__file__).parent.parent / f"{name}_weights" for name in ("tiny", "small")}
"""The backbones that are shipped with the project."""

DTYPES = ("float32", "bfloat16", "float16", "auto")
"""Of weights, as commands name them; ``auto`` is ``own_dtype``."""

Dtype = torch.dtype | Literal["auto"]


def load_backbone(
    name: str = "tiny",
    dtype: Dtype = "auto",
    device: torch.device | str = "cpu",
    **options: Any,
) -> Backbone:
    """Load a backbone in evaluation mode, its weights frozen.

    Args:
        name: ``"tiny"`` or ``"small"`` (embedded), a local folder, or a hub id such as
            ``"llava-hf/llava-1.5-7b-hf"``. A folder of LoRA adapters, as ``train_backbone.py`` saves them, is merged
            into the model it was trained on, one of deltas (``maskgym.backbones.small.deltas``) into SmolLM2. Nothing
            in it is run or unpickled.
        dtype: of the weights; ``"auto"``: float32 on the CPU; elsewhere what the model's config has, which is what it
            was saved in, and bfloat16 if it has none.
        device: where to run.
        **options: of ``Backbone``: ``heads``, ``width``, ``protected_layers``, ``max_visual_tokens``, …

    Raises:
        InputError: nothing loadable under that name, an architecture that no family covers, files that bring code or
            pickles, a package that ``small`` needs and that isn't there, or a device that isn't.
    """
    place = _place_of(name)
    check_placement(dtype, device)
    where, config = _described(place, name)
    if isinstance(where, Path):
        check_sizes(config, where, name)
    wanted = _own_dtype(config, device) if dtype == "auto" else dtype
    try:
        model: Any = AutoModelForImageTextToText.from_pretrained(
            where, dtype=wanted, use_safetensors=True, trust_remote_code=False
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


def own_dtype(name: str, device: torch.device | str) -> torch.dtype:
    """What ``load_backbone`` takes for ``dtype="auto"``, without loading a weight.

    Raises:
        InputError: as ``load_backbone``.
    """
    check_placement("auto", device)
    if torch.device(device).type == "cpu":
        return torch.float32
    return _own_dtype(_described(_place_of(name), name)[1], device)


def _own_dtype(config: PretrainedConfig, device: torch.device | str) -> torch.dtype:
    if torch.device(device).type == "cpu":  # on most, narrow types are slower
        return torch.float32
    own: Any = config.dtype or config.get_text_config().dtype
    return own if own in map(named_dtype, DTYPES[:-1]) else torch.bfloat16


def named_dtype(name: str) -> Dtype:
    """One of ``DTYPES`` as ``load_backbone`` takes it."""
    return "auto" if name == "auto" else getattr(torch, name)


def dtype_name(dtype: torch.dtype) -> Any:
    """Of a dtype, as commands name it."""
    return str(dtype).removeprefix("torch.")


def _described(place: str | Path, name: str) -> tuple[str | Path, PretrainedConfig]:
    """The folder or hub id that a model's weights are loaded from, and its config.

    Raises:
        InputError: neither can be read, or files that are not taken; the message has the ``name``.
    """
    where = _base(base_of(Path(place), name)) if holds_adapters(place) else place
    if holds_deltas(where):
        where = converted(Path(where), name)
    try:
        check_files(where, name)
        return where, AutoConfig.from_pretrained(where, trust_remote_code=False)
    except InputError:
        raise
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        remedy = "check the folder" if isinstance(place, Path) else how_to_fetch(name)
        raise InputError(f"backbone {name!r} could not be read ({first_line(error)}); {remedy}") from error


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


def check_placement(dtype: Dtype, device: torch.device | str) -> None:
    """Refuse a dtype that is none, nor ``"auto"``, and a device that is not there.

    Raises:
        InputError: naming it.
    """
    if dtype != "auto" and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise InputError(
            f"dtype is {dtype!r}; it must be a torch dtype of floating point, such as torch.float32, or 'auto'"
        )
    try:
        kind = torch.device(device).type
    except RuntimeError as error:
        raise InputError(f"device {device!r} is not one that torch knows; use 'cpu' or 'cuda'") from error
    if kind == "cuda" and not torch.cuda.is_available():
        raise InputError(f"device {device!s} is not there (no CUDA in this process); use device='cpu'")
