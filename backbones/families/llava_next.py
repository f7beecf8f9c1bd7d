"""LLaVA-NeXT: an overview and as many tiles as the image's shape asks for, with a token at each line's end."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.models.llava_next.modeling_llava_next import image_size_to_num_patches

from maskgym.backbones.encodings.saliency import Saliency
from maskgym.backbones.families.clip_saliency import ClipSaliencyFamily
from maskgym.backbones.families.family import clip_side_flops, clip_tokens


class LlavaNextFamily(ClipSaliencyFamily):
    """``LlavaNextForConditionalGeneration`` ("anyres"); the number of visual tokens differs per image."""

    model_types = ("llava_next",)

    @property
    def most_visual_tokens(self) -> int:
        vision = self.config.vision_config
        side = vision.image_size // vision.patch_size
        tiles = [(height // vision.image_size, width // vision.image_size) for height, width in self._pinpoints]
        # the overview, all tiles, and a line end after each of their lines
        return clip_tokens(self.config) + max(rows * columns * side * side + rows * side for rows, columns in tiles)

    @property
    def _pinpoints(self) -> list[list[int]]:
        return self.config.image_grid_pinpoints

    def features(self, batch: Any) -> list[Tensor]:
        pixels = batch["pixel_values"].to(self.model.device, self.model.dtype)
        sizes = batch["image_sizes"]
        outputs = self.model.model.get_image_features(pixel_values=pixels, image_sizes=sizes, return_dict=True)
        return list(outputs.pooler_output)

    def by_image(
        self, batch: Any, said: dict[str, tuple[Tensor, Tensor, int]], features: Tensor, images: int
    ) -> list[dict[str, Saliency]]:
        """Packed as the visual tokens are; the tokens at the lines' ends receive nothing."""
        tiles = [self._tiles(batch, row) for row in range(images)]
        rows: list[dict[str, Saliency]] = [{} for _ in tiles]
        for signal, (received, keys, flops) in said.items():
            both = torch.cat([received[..., None], keys.float()], dim=2)  # narrow types would tie scores
            packed, _ = self.model.model.pack_image_features(
                list(both.split(tiles)),
                batch["image_sizes"],
                vision_feature_select_strategy=self.config.vision_feature_select_strategy,
                image_newline=both.new_zeros(both.shape[2]),
            )
            for row, count, values in zip(rows, tiles, packed, strict=True):
                row[signal] = Saliency(values[:, 0], values[:, 1:].to(keys.dtype), flops=count * flops)
        return rows

    def _tiles(self, batch: Any, row: int) -> int:
        size = batch["image_sizes"][row]
        return image_size_to_num_patches(size, self._pinpoints, self.config.vision_config.image_size)

    def vision_flops(self, batch: Any, row: int) -> tuple[int, int]:
        return clip_side_flops(self.config, self._tiles(batch, row))
