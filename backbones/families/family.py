"""What differs between model families, and the list of those supported.

A family says where the decoder is, how many visual tokens an image can have, what its vision side costs, and how its
rotary positions run. Everything else is the same for all and lives in ``maskgym.backbones.query_encoder`` and
``maskgym.backbones.backbone``.

Shape legend: S tokens of a sequence, R rotary position components.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Sequence
from typing import Any, ClassVar

import torch
from PIL import Image
from torch import Tensor, nn

from maskgym.backbones.encodings.saliency import Saliency
from maskgym.backbones.plans.cost import clip_tower_flops, mlp_flops
from maskgym.common.errors import InputError


class Family(ABC):
    """One model family, on stock ``transformers``.

    Args:
        model: a ``…ForConditionalGeneration`` of ``transformers``.
        processor: its processor.
    """

    model_types: ClassVar[tuple[str, ...]] = ()
    rope_needs_grid: ClassVar[bool] = False
    """Whether rotary positions follow the image's grid (``rope``) instead of the place in the sequence."""
    signals: ClassVar[tuple[str, ...]] = ()
    """What the vision tower can be asked (``maskgym.backbones.encodings.saliency.SIGNALS``)."""

    def __init__(self, model: Any, processor: Any):
        self.model, self.processor, self.config = model, processor, model.config

    @property
    def decoder(self) -> nn.Module:
        """The decoder body: ``layers``, ``norm``, ``rotary_emb``, ``embed_tokens``."""
        return self.model.model.language_model

    @property
    @abstractmethod
    def most_visual_tokens(self) -> int:
        """The most visual tokens that an image can have."""

    def limit_visual_tokens(self, limit: int) -> None:
        """Make the processor scale images so that none has more visual tokens than ``limit``."""
        if limit < self.most_visual_tokens:
            raise InputError(
                f"max_visual_tokens is {limit}, but {self.config.model_type} images have up to "
                f"{self.most_visual_tokens}; leave it out"
            )

    def process(self, images: Sequence[Image.Image], prompts: Sequence[str]) -> Any:
        """The processor's batch for one image a prompt, padded."""
        return self.processor(
            images=[[image] for image in images], text=list(prompts), return_tensors="pt", padding=True
        )

    @abstractmethod
    def features(self, batch: Any) -> list[Tensor]:
        """Visual tokens after the projector, (n, D) an image; differentiable."""

    def observe(self, batch: Any, signals: Collection[str]) -> tuple[list[Tensor], list[dict[str, Saliency]]]:
        """``features``, and of each image what its tower says by the way.

        Args:
            batch: the processor's.
            signals: of ``signals``.
        """
        visual = self.features(batch)
        return visual, [{} for _ in visual]

    def project(self, merged: Tensor) -> Tensor:
        """Merged tokens as the language model takes them, (…, D).

        Where a ``Saliency`` has features, these are merged, and must go through the projector; elsewhere visual tokens
        are merged, and nothing is left to do.
        """
        return merged

    def project_flops(self, tokens: Tensor) -> Tensor:
        """FLOPs of ``project`` on so many tokens."""
        return torch.zeros_like(tokens)

    def grid(self, batch: Any, row: int) -> tuple[int, ...] | None:
        """(time, height, width) of an image in patches, where rotary positions need it."""
        return None

    @abstractmethod
    def vision_flops(self, batch: Any, row: int) -> tuple[int, int]:
        """FLOPs of the vision tower and of the projector on one image."""

    def rope(self, is_image_S: Tensor, grid: tuple[int, ...] | None) -> Tensor:
        """Rotary positions (S, R) of a sequence with one image: here the place in it. Asked only if
        ``rope_needs_grid``."""
        return torch.arange(len(is_image_S))[:, None]


def clip_side_flops(config: Any, tiles: int) -> tuple[int, int]:
    """Vision tower and projector FLOPs of ``tiles`` images through a CLIP tower and LLaVA's two-layer projector."""
    vision, hidden = config.vision_config, config.text_config.hidden_size
    tower = clip_tower_flops(
        vision.image_size,
        vision.patch_size,
        vision.num_channels,
        vision.hidden_size,
        vision.num_hidden_layers,
        vision.intermediate_size,
    )
    layer = config.vision_feature_layer
    features = 1 if isinstance(layer, int) else len(layer)
    return tiles * tower, tiles * mlp_flops(clip_tokens(config), vision.hidden_size * features, hidden, hidden)


def clip_tokens(config: Any) -> int:
    """Visual tokens that a CLIP tower gives for one tile."""
    vision = config.vision_config
    return (vision.image_size // vision.patch_size) ** 2 + (config.vision_feature_select_strategy == "full")
