"""LLaVA-NeXT: an overview and as many tiles as the image's shape asks for, with a token at each line's end."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers.models.llava_next.modeling_llava_next import image_size_to_num_patches

from backbones.family import Family, clip_side_flops, clip_tokens


class LlavaNextFamily(Family):
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

    def vision_flops(self, batch: Any, row: int) -> tuple[int, int]:
        size = batch["image_sizes"][row]
        tiles = image_size_to_num_patches(size, self._pinpoints, self.config.vision_config.image_size)
        return clip_side_flops(self.config, tiles)
