"""LoRA adapters on what plans cut, and how tuned models are saved."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from peft import LoraConfig, PeftModel
from torch import nn

from maskgym.backbones.backbone import Backbone
from maskgym.common.atomic import whole_folder
from maskgym.common.errors import InputError


def lora_config(backbone: Backbone, rank: int) -> LoraConfig:
    """Adapters of a rank on every linear layer that plans cut: the decoder's attention and MLP projections.

    Raises:
        InputError: a rank below 1.
    """
    if rank < 1:
        raise InputError(f"LoRA rank is {rank}; it must be at least 1")
    decoder: Any = backbone.family.decoder
    projections = {module for module in decoder.layers.modules() if isinstance(module, nn.Linear)}
    names = [name for name, module in backbone.model.named_modules() if module in projections]
    return LoraConfig(r=rank, lora_alpha=2 * rank, lora_dropout=0.05, target_modules=names)


def save_model(model: Any, backbone: Backbone, folder: Path) -> None:
    """Write a model in Hugging Face format, or its adapters if it is a ``PeftModel``, and the processor.

    Adapters name the model below them as the user did, not by where it happened to lie.
    """
    options = {}
    if isinstance(model, PeftModel):
        options["save_embedding_layers"] = False  # they are not adapted, which PEFT would ask the hub about
        for config in model.peft_config.values():
            config.base_model_name_or_path = backbone.name
    with whole_folder(folder) as unfinished:
        model.save_pretrained(unfinished, **options)
        backbone.processor.save_pretrained(unfinished)
