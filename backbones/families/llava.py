"""LLaVA-1.5: a CLIP tower, one tile an image, a fixed number of visual tokens."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from maskgym.backbones.encodings.saliency import Saliency
from maskgym.backbones.families.clip_saliency import ClipSaliencyFamily
from maskgym.backbones.families.family import clip_side_flops, clip_tokens
from maskgym.backbones.plans.cost import mlp_flops


class LlavaFamily(ClipSaliencyFamily):
    """``LlavaForConditionalGeneration`` (arXiv 2310.03744)."""

    model_types = ("llava",)

    @property
    def most_visual_tokens(self) -> int:
        return clip_tokens(self.config)

    def features(self, batch: Any) -> list[Tensor]:
        pixels = batch["pixel_values"].to(self.model.device, self.model.dtype)
        return list(self.model.model.get_image_features(pixel_values=pixels, return_dict=True).pooler_output)

    def by_image(
        self, batch: Any, said: dict[str, tuple[Tensor, Tensor, int]], features: Tensor, images: int
    ) -> list[dict[str, Saliency]]:
        return [
            {
                signal: Saliency(received[image], keys[image], features[image], flops)
                for signal, (received, keys, flops) in said.items()
            }
            for image in range(images)
        ]

    def project(self, merged: Tensor) -> Tensor:
        return self.model.model.multi_modal_projector(merged)

    def project_flops(self, tokens: Tensor) -> Tensor:
        projector, hidden = self.model.model.multi_modal_projector, self.config.text_config.hidden_size
        return tokens * mlp_flops(1, projector.linear_1.in_features, hidden, hidden)

    def vision_flops(self, batch: Any, row: int) -> tuple[int, int]:
        return clip_side_flops(self.config, tiles=1)
