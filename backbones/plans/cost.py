"""What a plan costs, in FLOPs (2 x multiply-accumulates), as ``torch.utils.flop_counter`` counts them.

Counted: matrix products and convolutions, attention at its full n x n (no causal halving). Not counted, as
there: norms, activations, softmax, rotary embedding, look-ups. All arithmetic is int64, so equality with the
counter is exact.

Shape legend: B rows, L layers, H head slots per layer, G key-value groups per layer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
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
        head_width: columns of one query head.
    """

    hidden: int
    vocab: int
    query_width: tuple[int, ...]
    key_width: tuple[int, ...]
    mlp_width: tuple[int, ...]
    slots_per_group: int = 1
    mlp_follows_heads: bool = True
    head_width: int = 0

    def prefill(self, masks: AnyPlan, n: Tensor) -> Tensor:
        """FLOPs of the prefill up to the first answer token's logits, (B,) int64.

        Args:
            masks: B plans.
            n: tokens of each prompt, text and visual, that the plans keep: (B,), or (B, L) layer by layer.
        """
        per_token_BL, per_pair_BL = self.layer_terms(masks)
        n_BL = n[:, None] if n.dim() == 1 else n
        return (n_BL * per_token_BL + n_BL * n_BL * per_pair_BL).sum(1) + 2 * self.hidden * self.vocab

    def decode(self, masks: AnyPlan, n: Tensor, new_tokens: int | Tensor) -> Tensor:
        """FLOPs of the steps after the prefill, (B,) int64.

        The first answer token comes out of the prefill, so an answer of ``new_tokens`` takes one step fewer.
        Step t attends to what the prompt left in each layer and to t tokens of the answer.
        """
        if isinstance(new_tokens, int) and new_tokens <= 1:
            return torch.zeros(len(n), dtype=n.dtype, device=n.device)
        n_BL = n[:, None] if n.dim() == 1 else n
        steps_B = (torch.as_tensor(new_tokens, device=n.device) - 1).clamp_min(0).expand(len(n))
        per_token_BL, per_pair_BL = self.layer_terms(masks)
        attended_BL = steps_B[:, None] * n_BL + (steps_B * (steps_B + 1) // 2)[:, None]
        head = 2 * self.hidden * self.vocab
        return steps_B * (per_token_BL.sum(1) + head) + (attended_BL * per_pair_BL).sum(1)

    def layer_terms(self, masks: AnyPlan) -> tuple[Tensor, Tensor]:
        """FLOPs of each layer per token, and per (query token, key token) pair; each (B, L) int64.

        Written so that it also prices relaxed plans (``soft_decoder.Gates``), in floating point.
        """
        heads_BLH = masks.effective_heads
        heads_BLH = heads_BLH.long() if heads_BLH.dtype == torch.bool else heads_BLH
        groups_BLG = heads_BLH
        if self.slots_per_group > 1:  # a group is computed unless all its slots are dropped
            groups_BLG = 1 - (1 - heads_BLH.unflatten(2, (-1, self.slots_per_group))).prod(3)
        d = self.hidden
        per_slot = [4 * d * width for width in self.query_width]
        mlp = [6 * d * width for width in self.mlp_width]
        if self.mlp_follows_heads:
            per_slot = [own + slice_ for own, slice_ in zip(per_slot, mlp, strict=True)]
        token_BL = _weigh(heads_BLH, per_slot) + _weigh(groups_BLG, [4 * d * width for width in self.key_width])
        if not self.mlp_follows_heads:
            token_BL = token_BL + masks.layers * sum(mlp)
        return token_BL, _weigh(heads_BLH, [4 * width for width in self.query_width])


def _weigh(kept: Tensor, weights: Sequence[int]) -> Tensor:
    """The sum of the weights of what is kept along the last axis, exact where the masks are."""
    return (kept * _tensor(tuple(weights), kept.device)).sum(-1)


@lru_cache(maxsize=256)
def _tensor(weights: tuple[int, ...], device: torch.device) -> Tensor:
    """Plans are priced over and over with the same few."""
    with torch.inference_mode(False):  # whoever asks first, what is kept must do for all
        return torch.tensor(weights, device=device)


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
