"""Idefics3 and SmolVLM: a SigLIP tower on every tile and an overview, pixel shuffle, markers between tiles, GQA."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from torch import Tensor, nn

from maskgym.backbones.encodings.saliency import MEAN_FEATURES, MEAN_LAST, Saliency, hearing, mean_received
from maskgym.backbones.families.family import Family
from maskgym.backbones.plans.cost import mlp_flops


class Idefics3Family(Family):
    """``Idefics3ForConditionalGeneration`` (arXiv 2408.12637), ``SmolVLMForConditionalGeneration``
    (arXiv 2504.05299)."""

    model_types = ("idefics3", "smolvlm")
    signals = (MEAN_LAST, MEAN_FEATURES)

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

    def observe(self, batch: Any, signals: Collection[str]) -> tuple[list[Tensor], list[dict[str, Saliency]]]:
        """The tower's last layer, from which the features come too; a visual token gets the mean of its patches."""
        if not signals:
            return super().observe(batch, signals)
        attention = self.model.model.vision_model.encoder.layers[-1].self_attn
        with hearing({"q": attention.q_proj, "k": attention.k_proj}, {}) as heard:
            visual = self.features(batch)
        q_bnC, k_bnC = heard["q"], heard["k"]
        heads = self.config.vision_config.num_attention_heads
        received_bn = self._shuffle(mean_received(q_bnC, k_bnC, heads)[..., None])[..., 0]
        keys = {MEAN_LAST: self._shuffle(k_bnC), MEAN_FEATURES: self._shuffle(k_bnC.unflatten(2, (heads, -1)).mean(2))}
        tiles = [self._tiles(batch, row) for row in range(len(visual))]
        flops = 2 * k_bnC.shape[1] ** 2 * k_bnC.shape[2]
        rows: list[dict[str, Saliency]] = [{} for _ in tiles]
        for signal in signals:
            parts = zip(rows, tiles, received_bn.split(tiles), keys[signal].split(tiles), strict=True)
            for row, count, received, own in parts:
                row[signal] = Saliency(received.flatten(), own.flatten(0, 1), flops=count * flops)
        return visual, rows

    def _shuffle(self, x_bnC: Tensor) -> Tensor:
        """Means over the patches that make one visual token."""
        scale = self.config.scale_factor
        shuffled = self.model.model.connector.pixel_shuffle(x_bnC, scale)
        return shuffled.unflatten(2, (scale**2, -1)).mean(2)

    def _tiles(self, batch: Any, row: int) -> int:
        return int((batch["pixel_values"][row] != 0).flatten(1).any(1).sum())  # the model drops all-zero padding tiles

    def vision_flops(self, batch: Any, row: int) -> tuple[int, int]:
        vision, scale, tiles = self.config.vision_config, self.config.scale_factor**2, self._tiles(batch, row)
        d, n = vision.hidden_size, (vision.image_size // vision.patch_size) ** 2
        convolution = 2 * n * d * vision.num_channels * vision.patch_size**2
        layer = 2 * n * (4 * d * d + 2 * d * vision.intermediate_size) + 4 * n * n * d
        projector = mlp_flops(n // scale, d * scale, self.config.text_config.hidden_size)
        return tiles * (convolution + vision.num_hidden_layers * layer), tiles * projector
