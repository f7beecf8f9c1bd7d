"""LLaVA-1.5: a CLIP tower, one tile an image, a fixed number of visual tokens."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from backbones.family import Family, clip_side_flops, clip_tokens


class LlavaFamily(Family):
    """``LlavaForConditionalGeneration`` (arXiv 2310.03744)."""

    model_types = ("llava",)

    @property
    def most_visual_tokens(self) -> int:
        return clip_tokens(self.config)

    def features(self, batch: Any) -> list[Tensor]:
        pixels = batch["pixel_values"].to(self.model.device, self.model.dtype)
        return list(self.model.model.get_image_features(pixel_values=pixels, return_dict=True).pooler_output)

    def vision_flops(self, batch: Any, row: int) -> tuple[int, int]:
        return clip_side_flops(self.config, tiles=1)
