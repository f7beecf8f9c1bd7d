"""What a CLIP tower says of its patches; shared by the families that have one.

Shape legend: b tiles, n patches of a tile, C tower width, W width of a key.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Collection
from typing import Any

from torch import Tensor

from maskgym.backbones.encodings.saliency import (
    CLS_FEATURES,
    CLS_LAST,
    SIGNALS,
    Saliency,
    first_row,
    hearing,
    mean_received,
)
from maskgym.backbones.families.family import Family


class ClipSaliencyFamily(Family):
    """A family with a CLIP tower, whose first token is the class token.

    Of the last layer PruMerge takes the attention of undivided queries and keys, and compares undivided keys. Of the
    layer that the features come from, VisionZip takes the heads' attention, and compares keys averaged over heads.
    """

    signals = tuple(SIGNALS)

    def observe(self, batch: Any, signals: Collection[str]) -> tuple[list[Tensor], list[dict[str, Saliency]]]:
        layers = {signal: self._layer(signal) for signal in signals}
        tower = self.model.model.vision_tower.encoder.layers
        modules = {
            f"{name}{number}": getattr(tower[number].self_attn, f"{name}_proj")
            for number in set(layers.values())
            for name in "qk"
        }
        with hearing(modules, {"projector": self.model.model.multi_modal_projector}) as heard:
            visual = self.features(batch)
        said = {
            signal: self._read(signal, heard[f"q{number}"], heard[f"k{number}"]) for signal, number in layers.items()
        }
        return visual, self.by_image(batch, said, heard["projector"][0][0], len(visual))

    @abstractmethod
    def by_image(
        self, batch: Any, said: dict[str, tuple[Tensor, Tensor, int]], features: Tensor, images: int
    ) -> list[dict[str, Saliency]]:
        """The signals image by image.

        Args:
            batch: the processor's.
            said: of each signal what the tiles' patches receive (b, n), their keys (b, n, W), and the FLOPs of a tile.
            features: (b, n, C) what the projector was given.
            images: how many there are.
        """

    def _layer(self, signal: str) -> int:
        """Number of the tower layer that a signal is about."""
        layers = self.config.vision_config.num_hidden_layers
        if signal.endswith("last"):
            return layers - 1
        chosen = self.config.vision_feature_layer
        chosen = chosen if isinstance(chosen, int) else chosen[-1]
        return layers + chosen if chosen < 0 else max(0, chosen - 1)  # hidden state 0 is what enters layer 0

    def _read(self, signal: str, q_bnC: Tensor, k_bnC: Tensor) -> tuple[Tensor, Tensor, int]:
        heads, last = self.config.vision_config.num_attention_heads, signal.endswith("last")
        n, width = k_bnC.shape[1:]
        if signal in (CLS_LAST, CLS_FEATURES):
            received, flops = first_row(q_bnC, k_bnC, 1 if last else heads), 2 * n * width
        else:
            received, flops = mean_received(q_bnC, k_bnC, heads), 2 * n * n * width
        keys = k_bnC if last else k_bnC.unflatten(2, (heads, -1)).mean(2)
        start = 0 if self.config.vision_feature_select_strategy == "full" else 1
        return received[:, start:], keys[:, start:], flops
