"""What a plan costs, in FLOPs (2 x multiply-accumulates), as ``torch.utils.flop_counter`` counts them.

Counted: matrix products and convolutions, attention at its full n x n (no causal halving). Not counted, as
there: norms, activations, softmax, rotary embedding, look-ups. All arithmetic is int64, so equality with the
counter is exact.

Shape legend: B rows, L layers, H head slots per layer.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Protocol

import torch
from torch import Tensor


class AnyPlan(Protocol):
    """The part of plans, hard or relaxed, that has a price here."""

    @property
    def effective_heads(self) -> Tensor: ...

    @property
    def layers(self) -> Tensor: ...


@dataclass(frozen=True)
class Cost:
    """FLOPs of B plans by part, each (B,) int64."""

    vision: Tensor
    projector: Tensor
    controller: Tensor
    prefill: Tensor
    decode: Tensor

    @property
    def llm(self) -> Tensor:
        """What counts against the budget: prefill, decode and the controller that chose the plan."""
        return self.controller + self.prefill + self.decode

    @property
    def total(self) -> Tensor:
        return self.vision + self.projector + self.llm


@dataclass(frozen=True)
class DecoderShape:
    """The sizes of a decoder that its cost depends on.

    Attributes:
        hidden: width of the residual stream.
        vocab: rows of the output head.
        query_width: (H,) output columns of q_proj in each head slot.
        key_width: (G,) output columns of k_proj (and of v_proj) of each key-value group.
        slots_per_group: consecutive head slots that share a key-value group; G = H / slots_per_group. A group is
            computed while any of its slots is kept.
        mlp_width: (H,) MLP columns in each head slot; their sum is the intermediate size.
        mlp_follows_heads: whether dropping a slot drops its MLP slice (``width="heads+mlp"``).
    """

    hidden: int
    vocab: int
    query_width: tuple[int, ...]
    key_width: tuple[int, ...]
    mlp_width: tuple[int, ...]
    slots_per_group: int = 1
    mlp_follows_heads: bool = True

    def prefill(self, masks: AnyPlan, n: Tensor) -> Tensor:
        """FLOPs of the prefill up to the first answer token's logits, (B,) int64.

        Args:
            masks: B plans.
            n: (B,) tokens of each prompt, text and visual, that the plans keep.
        """
        per_token, per_pair = self.layer_terms(masks)
        return n * per_token + n * n * per_pair + 2 * self.hidden * self.vocab

    def decode(self, masks: AnyPlan, n: Tensor, new_tokens: int | Tensor) -> Tensor:
        """FLOPs of the steps after the prefill, (B,) int64.

        The first answer token comes out of the prefill, so an answer of ``new_tokens`` takes one step fewer.
        Step t attends to the prompt and to t tokens of the answer.
        """
        steps = (torch.as_tensor(new_tokens, device=n.device) - 1).clamp_min(0).expand_as(n)
        per_token, per_pair = self.layer_terms(masks)
        attended = steps * n + steps * (steps + 1) // 2
        return steps * (per_token + 2 * self.hidden * self.vocab) + attended * per_pair

    def layer_terms(self, masks: AnyPlan) -> tuple[Tensor, Tensor]:
        """Summed over layers: FLOPs per token, and per (query token, key token) pair; each (B,).

        Written so that it also prices relaxed plans (``soft_decoder.Gates``), in floating point.
        """
        heads_BLH = masks.effective_heads
        heads_BLH = heads_BLH.long() if heads_BLH.dtype == torch.bool else heads_BLH
        kept = heads_BLH.sum(1)  # (B, H) layers in which each slot is computed
        # A group is computed unless all its slots are dropped.
        groups = (1 - (1 - heads_BLH.unflatten(2, (-1, self.slots_per_group))).prod(3)).sum(1)  # (B, G)
        d = self.hidden
        mlp = [6 * d * width for width in self.mlp_width]
        pair = kept @ kept.new_tensor([4 * width for width in self.query_width])
        token = kept @ kept.new_tensor([4 * d * width for width in self.query_width])
        token = token + groups @ kept.new_tensor([4 * d * width for width in self.key_width])
        if self.mlp_follows_heads:
            token = token + kept @ kept.new_tensor(mlp)
        else:
            token = token + masks.layers.sum(1) * sum(mlp)
        return token, pair


def clip_tower_flops(
    image_size: int, patch_size: int, channels: int, hidden: int, layers: int, intermediate: int
) -> int:
    """FLOPs of a CLIP vision transformer on one image: patch convolution and ``layers`` encoder layers."""
    patches = (image_size // patch_size) ** 2
    n = patches + 1  # the class token
    convolution = 2 * patches * hidden * channels * patch_size**2
    layer = 2 * n * (4 * hidden**2 + 2 * hidden * intermediate) + 4 * n * n * hidden
    return convolution + layers * layer


def mlp_flops(tokens: int, *widths: int) -> int:
    """FLOPs of a chain of linear layers of the given widths, applied to ``tokens`` tokens."""
    return sum(2 * tokens * a * b for a, b in pairwise(widths))
