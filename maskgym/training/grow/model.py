"""The VLM that grows: a vision tower and a projector of Hugging Face's, and a decoder with low-rank deltas.

Shape legend: B images, N visual tokens, S places, D hidden width, T answer tokens, V vocabulary.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from maskgym.backbones.small.deltas import ATTENTION, BASE, MLP, SETTINGS, WHOLE
from maskgym.common import atomic
from maskgym.training.grow.dense import DenseDecoder, DenseGates
from maskgym.training.grow.plans import Laid, lay_out_full
from maskgym.training.grow.stream import Batch

SHARDS = {
    "attention": tuple(f"lora.{name}." for name in ATTENTION),
    "mlp": tuple(f"lora.{name}." for name in MLP),
    "vision": ("norm.", *WHOLE),
}
"""Files of the trained weights, by what their tensors' names begin with."""

MEAN, SPREAD = 0.5, 0.25
"""Of pixels in [0, 1], as the processor has them."""


class Vision(nn.Module):
    """Vision tower and projector.

    Args:
        llava: of Hugging Face, whose parts are taken.
    """

    def __init__(self, llava: Any):
        super().__init__()
        self.tower, self.projector = llava.model.vision_tower, llava.model.multi_modal_projector
        self.train().requires_grad_(True)

    def forward(self, pixels: Tensor) -> Tensor:
        """Visual tokens (B, N, D), in float32, of images (B, height, width, 3) of bytes."""
        x = ((pixels.float() / 255 - MEAN) / SPREAD).permute(0, 3, 1, 2)
        with self._half(x):
            hidden = self.tower(x, output_hidden_states=True).hidden_states[-1][:, 1:]
            return self.projector(hidden).float()

    @staticmethod
    def _half(x: Tensor) -> AbstractContextManager[Any]:
        return torch.autocast(x.device.type, torch.bfloat16, enabled=x.is_cuda)

    @torch.no_grad()
    def scale_to(self, loudness: float, pixels: Tensor) -> None:
        """Make visual tokens as loud as ``loudness`` (root mean square)."""
        factor = loudness / self(pixels).square().mean().sqrt()
        self.projector.linear_2.weight.mul_(factor)
        self.projector.linear_2.bias.mul_(factor)


class Grown(nn.Module):
    """Vision and language.

    Args:
        vision: tower and projector.
        decoder: the language model.
        before: ids of a prompt before its image.
    """

    before: Tensor

    def __init__(self, vision: Vision, decoder: DenseDecoder, before: list[int]):
        super().__init__()
        self.vision, self.decoder = vision, decoder
        self.register_buffer("before", torch.tensor(before), persistent=False)

    def lay_out(self, batch: Batch) -> Laid:
        """The batch with everything kept."""
        visual_BND = self.vision(batch.pixels)
        prefix = len(self.before) + visual_BND.shape[1]
        first_BP = torch.arange(prefix, device=visual_BND.device).expand(len(visual_BND), -1)
        positions_BS = torch.cat([first_BP, batch.places + prefix], dim=1)
        return lay_out_full(visual_BND, batch.owner, positions_BS, len(self.before))

    def asked(self, batch: Batch, laid: Laid, gates: DenseGates, dtype: torch.dtype) -> Tensor:
        """(T, V) logits at the places whose next token is to be told."""
        embedding_VD = self.decoder.embedding_VD
        prefix = len(self.before) + laid.visual_BND.shape[1]
        before_BSD = F.embedding(self.before, embedding_VD).expand(len(batch.ids), -1, -1)
        x_BSD = torch.cat([before_BSD, laid.visual_BND, F.embedding(batch.ids, embedding_VD)], dim=1)
        hidden_BSD = self.decoder(x_BSD, laid.positions_BS, laid.first_bias_BSS, laid.bias_BSS, gates, dtype)
        # Without the token for images, which nobody says: an odd number of words is slow on a GPU.
        words_VD = embedding_VD[: 8 * (len(embedding_VD) // 8)].to(dtype)
        return F.linear(hidden_BSD[:, prefix:][batch.asked].to(dtype), words_VD)

    def full_gates(self, rows: int) -> DenseGates:
        """The gates of plans that keep everything."""
        device, layers = self.before.device, len(self.decoder.norm_in)
        return DenseGates(
            torch.ones(rows, layers, self.decoder.q_heads, device=device),
            torch.ones(rows, layers, self.decoder.intermediate, device=device),
        )

    def tensors(self) -> dict[str, Tensor]:
        """The trained weights under the names of the files of deltas."""
        named = {f"lora.{name}.{side}": getattr(self.decoder, side)[name] for side in "AB" for name in self.decoder.A}
        named |= {
            "norm.input": self.decoder.norm_in,
            "norm.post": self.decoder.norm_post,
            "norm.final": self.decoder.norm_final,
        }
        return named | vision_tensors(self.vision)

    def save(self, folder: Path) -> None:
        """Write the trained weights, in half precision."""
        save_shards(self.tensors(), folder)

    @torch.no_grad()
    def load(self, folder: Path) -> None:
        """Read what ``save`` wrote, as far as it is there."""
        own = self.tensors()
        for path in sorted(folder.glob("*.safetensors")):
            for name, tensor in load_file(path).items():
                own[name].copy_(tensor)


def vision_tensors(vision: Vision) -> dict[str, Tensor]:
    """The weights of tower and projector under Hugging Face's names."""
    parts = {"model.vision_tower": vision.tower, "model.multi_modal_projector": vision.projector}
    return {f"{part}.{name}": p for part, module in parts.items() for name, p in module.named_parameters()}


def save_shards(tensors: dict[str, Tensor], folder: Path) -> None:
    """Write tensors in half precision, a file for each of ``SHARDS`` that has some."""
    folder.mkdir(parents=True, exist_ok=True)
    for shard, beginnings in SHARDS.items():
        own = {name: t.detach().half().cpu().contiguous() for name, t in tensors.items() if name.startswith(beginnings)}
        if own:
            save_file(own, folder / f"{shard}.safetensors", {"format": "pt"})
    atomic.write_json(folder / SETTINGS, {"base": BASE})
