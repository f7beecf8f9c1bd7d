"""Qwen2.5-VL: dynamic resolution, window attention in the tower, M-RoPE, GQA."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from maskgym.backbones.encodings.saliency import MEAN_FEATURES, MEAN_LAST, Saliency, hearing, mean_received
from maskgym.backbones.engine.attention import rotate
from maskgym.backbones.families.family import Family
from maskgym.backbones.plans.cost import mlp_flops
from maskgym.common.errors import InputError


class Qwen25VLFamily(Family):
    """``Qwen2_5_VLForConditionalGeneration`` (arXiv 2502.13923)."""

    model_types = ("qwen2_5_vl",)
    rope_needs_grid = True
    signals = (MEAN_LAST, MEAN_FEATURES)

    @property
    def _merge(self) -> int:
        return self.config.vision_config.spatial_merge_size

    @property
    def _token_pixels(self) -> int:
        """Pixels behind one visual token."""
        return (self.config.vision_config.patch_size * self._merge) ** 2

    @property
    def most_visual_tokens(self) -> int:
        return self.processor.image_processor.size["longest_edge"] // self._token_pixels

    def limit_visual_tokens(self, limit: int) -> None:
        size = self.processor.image_processor.size
        if limit * self._token_pixels < size["shortest_edge"]:
            raise InputError(
                f"max_visual_tokens is {limit}; the processor's least image already has "
                f"{size['shortest_edge'] // self._token_pixels}"
            )
        size["longest_edge"] = min(size["longest_edge"], limit * self._token_pixels)

    def process(self, images: Sequence[Image.Image], prompts: Sequence[str]) -> Any:
        """Made from image processor and tokenizer alone: the whole processor needs torchvision, for its videos."""
        batch = dict(self.processor.image_processor(images=list(images), return_tensors="pt"))
        token = self.processor.tokenizer.convert_ids_to_tokens(self.config.image_token_id)
        counts = (batch["image_grid_thw"].prod(1) // self._merge**2).tolist()
        texts = [prompt.replace(token, token * count) for prompt, count in zip(prompts, counts, strict=True)]
        batch |= self.processor.tokenizer(texts, return_tensors="pt", padding=True)
        batch["mm_token_type_ids"] = (batch["input_ids"] == self.config.image_token_id).int()
        return batch

    def features(self, batch: Any) -> list[Tensor]:
        pixels = batch["pixel_values"].to(self.model.device, self.model.dtype)
        grids = batch["image_grid_thw"].to(self.model.device)
        outputs = self.model.model.get_image_features(pixels, grids, return_dict=True)
        return list(outputs.pooler_output)

    def observe(self, batch: Any, signals: Collection[str]) -> tuple[list[Tensor], list[dict[str, Saliency]]]:
        """The tower's last layer that attends over the whole image; a visual token gets the mean of its patches."""
        if not signals:
            return super().observe(batch, signals)
        vision = self.config.vision_config
        attention = self.model.model.visual.blocks[max(vision.fullatt_block_indexes)].attn
        with hearing({"qkv": attention.qkv}, {"rotations": attention}) as heard:
            visual = self.features(batch)
        q_PHW, k_PHW, _ = heard["qkv"].unflatten(1, (3, vision.num_heads, -1)).unbind(1)
        cos_PW, sin_PW = heard["rotations"][1]["position_embeddings"]
        q_PC, k_PC = rotate(q_PHW, cos_PW, sin_PW).flatten(1), rotate(k_PHW, cos_PW, sin_PW).flatten(1)
        keys = {MEAN_LAST: k_PHW.flatten(1), MEAN_FEATURES: k_PHW.mean(1)}
        rows, start = [], 0
        for row in range(len(visual)):
            order_n = self._raster(*self.grid(batch, row)[1:])
            patches = slice(start, start := start + len(order_n) * self._merge**2)
            received_n = mean_received(q_PC[None, patches], k_PC[None, patches], vision.num_heads)[0]
            flops = 2 * len(received_n) ** 2 * vision.hidden_size
            rows.append(
                {
                    signal: Saliency(
                        self._by_token(received_n[:, None], order_n)[:, 0],
                        self._by_token(keys[signal][patches], order_n),
                        flops=flops,
                    )
                    for signal in signals
                }
            )
        return visual, rows

    def _by_token(self, x_PW: Tensor, order_n: Tensor) -> Tensor:
        """(n, W) means over the patches of each visual token, in raster order."""
        return x_PW.unflatten(0, (-1, self._merge**2)).mean(1)[order_n.to(x_PW.device)]

    def _raster(self, height: int, width: int) -> Tensor:
        """(n,) where each visual token, in raster order, stands in the order in which the tower takes windows."""
        vision = self.config.vision_config
        side = vision.window_size // vision.patch_size // self._merge
        rows, columns = height // self._merge, width // self._merge
        row, column = torch.arange(rows)[:, None].expand(rows, columns), torch.arange(columns).expand(rows, columns)
        window = (row // side) * columns + column // side
        within = (row % side) * side + column % side
        taken = (window * side * side + within).flatten().argsort()
        return taken.argsort()

    def grid(self, batch: Any, row: int) -> tuple[int, ...]:
        return tuple(batch["image_grid_thw"][row].tolist())

    def vision_flops(self, batch: Any, row: int) -> tuple[int, int]:
        vision = self.config.vision_config
        _, height, width = self.grid(batch, row)
        n, d, m = height * width, vision.hidden_size, vision.intermediate_size
        patch = vision.in_channels * vision.temporal_patch_size * vision.patch_size**2
        linear = 2 * n * (4 * d * d + 3 * d * m)
        full = len(vision.fullatt_block_indexes)
        attention = (
            4 * d * (full * n * n + (vision.depth - full) * sum(size * size for size in self._windows(height, width)))
        )
        merged = d * self._merge**2
        projector = mlp_flops(n // self._merge**2, merged, merged, vision.out_hidden_size)
        return 2 * n * patch * d + vision.depth * linear + attention, projector

    def _windows(self, height: int, width: int) -> list[int]:
        """Patches in each attention window."""
        vision = self.config.vision_config
        side = vision.window_size // vision.patch_size // self._merge * self._merge
        cuts = [[min(side, edge - start) for start in range(0, edge, side)] for edge in (height, width)]
        return [rows * columns for rows in cuts[0] for columns in cuts[1]]

    def rope(self, is_image_S: Tensor, grid: tuple[int, ...] | None) -> Tensor:
        ids = torch.zeros(1, len(is_image_S), dtype=torch.long)
        positions, _ = self.model.model.get_rope_index(
            ids, mm_token_type_ids=is_image_S.int()[None], image_grid_thw=torch.tensor([grid])
        )
        return positions[:, 0].T
