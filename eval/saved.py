"""Folders with a trained controller: runs, and what ``AdaptiveVLM.save_pretrained`` wrote; which VLM each is for."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import torch

from maskgym.backbones.backbone import Backbone
from maskgym.backbones.expected_length import Expected, check_expected
from maskgym.backbones.loading.load import EMBEDDED, Dtype, load_backbone
from maskgym.backbones.loading.lora import holds_adapters
from maskgym.common.errors import InputError
from maskgym.common.plain_files import MALFORMED, read_json
from maskgym.common.run_folder import RunFolder
from maskgym.policies.controller.learned import EXPECTED, Controller, expectation_in, load_controller

DESCRIPTION, MODEL = "adaptive.json", "model"
HUB_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*")


def is_saved(folder: Path) -> bool:
    """Whether ``save_pretrained`` wrote there."""
    return os.path.isfile(folder / DESCRIPTION)


def described_backbone(folder: Path) -> tuple[str, dict[str, Any]]:
    """Name and options of the VLM that a folder's controller is for, as the folder has them.

    Raises:
        InputError: neither a run nor saved, or unreadable.
    """
    if is_saved(folder):
        file = folder / DESCRIPTION
        try:
            described = read_json(file)
            name, options = str(described["backbone"]), dict(described["backbone_options"])
        except MALFORMED as error:
            raise InputError(f"{str(file)!r} is not readable ({error!r}); save the controller again") from error
        return str(folder / MODEL) if name == MODEL else name, options
    if RunFolder(folder).is_run():
        return RunFolder(folder).backbone(), expectation_in(folder)
    raise InputError(
        f"{str(folder)!r} is neither a run folder (no config.yaml) nor what save_pretrained wrote (no "
        f"{DESCRIPTION}); give the path of one of these"
    )


def expected_by(folder: Path) -> Expected:
    """The answer length that a folder's controller priced plans at.

    Raises:
        InputError: as ``described_backbone``; or one that is none.
    """
    return check_expected(described_backbone(folder)[1].get(EXPECTED, 1))


def followed(folder: Path, name: str) -> str:
    """The VLM that ``described_backbone`` names, if the folder may choose it.

    What ``save_pretrained`` wrote is made to be shared: it may name a VLM within itself or on the hub, but no place on
    the machine of whoever loads it. A run's config has what its user typed, and is followed.

    Raises:
        InputError: another place, of a folder that is made to be shared.
    """
    if not is_saved(folder):
        return name
    model = folder / MODEL
    if name == str(model):
        may = model.resolve().parent == folder.resolve() and not holds_adapters(model)
    else:
        may = name in EMBEDDED or HUB_ID.fullmatch(name) is not None
    if may:
        return name
    raise InputError(
        f"{str(folder)!r} has its VLM in {name!r}, which is neither within it nor on the hub; if you trust that place, "
        "name it yourself as the backbone"
    )


def load_with_options(name: str, options: dict[str, Any], dtype: Dtype, device: torch.device | str) -> Backbone:
    """``load_backbone`` with the options that a folder has.

    Raises:
        InputError: as ``load_backbone``; or options that no backbone takes.
    """
    try:
        return load_backbone(name, dtype, device, **options)
    except TypeError as error:
        if not options:
            raise
        raise InputError(
            f"backbone {name!r} was saved with unusable options, {options!r:.80} ({error}); save the controller again"
        ) from error


def load_saved_controller(folder: Path, backbone: Backbone) -> Controller:
    """The controller that ``save_pretrained`` wrote.

    Raises:
        InputError: as ``load_controller``; where the backbone is another, the message names the one that was saved.
    """
    own, _ = described_backbone(folder)
    if backbone.name == own:
        return load_controller(folder, backbone)
    return load_controller(folder, backbone, remedy=f"it was saved for the backbone {own!r}; name that one")
