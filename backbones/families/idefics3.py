"""Idefics3 and SmolVLM: a SigLIP tower on every tile and an overview, pixel shuffle, markers between tiles, GQA."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from backbones.cost import mlp_flops
from backbones.family import Family


class Idefics3Family(Family):
    """``Idefics3ForConditionalGeneration`` (arXiv 2408.12637), ``SmolVLMForConditionalGeneration``
    (arXiv 2504.05299)."""

    model_types = ("idefics3", "smolvlm")

    @property
    def decoder(self) -> nn.Module:
        return self.model.model.text_model

    @property
    def _tile_tokens(self) -> int:
        vision = self.config.vision_config
        return (vision.image_size // vision.patch_size) ** 2 // self.config.scale_factor**2

    @property
    def most_visual_tokens(self) -> int:
        images = self.processor.image_processor
        if not images.do_image_splitting:
            return self._tile_tokens
        # the longest edge is scaled to ``size``; both edges are then cut into tiles
        edge = -(-images.size["longest_edge"] // images.max_image_size["longest_edge"])
        return (edge * edge + 1) * self._tile_tokens

    def features(self, batch: Any) -> list[Tensor]:
        pixels = batch["pixel_values"].to(self.model.device, self.model.dtype)
        mask = batch["pixel_attention_mask"].to(self.model.device)
        outputs = self.model.model.get_image_features(pixel_values=pixels, pixel_attention_mask=mask, return_dict=True)
        return list(outputs.pooler_output)

    def vision_flops(self, batch: Any, row: int) -> tuple[int, int]:
        vision, scale = self.config.vision_config, self.config.scale_factor**2
        tiles = int((batch["pixel_values"][row] != 0).flatten(1).any(1).sum())  # the model drops all-zero padding tiles
        d, n = vision.hidden_size, (vision.image_size // vision.patch_size) ** 2
        convolution = 2 * n * d * vision.num_channels * vision.patch_size**2
        layer = 2 * n * (4 * d * d + 2 * d * vision.intermediate_size) + 4 * n * n * d
        projector = mlp_flops(n // scale, d * scale, self.config.text_config.hidden_size)
        return tiles * (convolution + vision.num_hidden_layers * layer), tiles * projector
