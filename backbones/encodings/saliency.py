"""What a vision tower says of its patches while it encodes an image: attention received, keys, features.

PyTorch's attention returns no weights, so the row or the mean that is wanted is computed on the side, from the queries
and keys of one layer as hooks hear them; never a whole n x n matrix.

Shape legend: b images or tiles, n tokens, H heads, W head width, C tower width, N visual tokens of a layout.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

CHUNK = 128
"""Query rows at a time."""

CLS_LAST, CLS_FEATURES = "cls-last", "cls-features"
MEAN_LAST, MEAN_FEATURES = "mean-last", "mean-features"
SIGNALS = {
    CLS_LAST: "the class token's attention in the tower's last layer",
    CLS_FEATURES: "the class token's attention in the tower layer that the features come from",
    MEAN_LAST: "the mean attention received in the tower's last layer",
    MEAN_FEATURES: "the mean attention received in the tower layer that the features come from",
}


@dataclass(frozen=True, eq=False)
class Saliency:
    """What one layer says of the visual tokens of an image; of a batch, with a leading B.

    Attributes:
        received: (n,) attention received.
        keys: (n, W) by which tokens are compared.
        features: (n, C) what the projector takes, where it takes tokens one by one.
        flops: what computing this took; of a batch (B,).
    """

    received: Tensor
    keys: Tensor
    features: Tensor | None = None
    flops: int | Tensor = 0

    @property
    def nbytes(self) -> int:
        tensors = (self.received, self.keys, self.features)
        return sum(part.numel() * part.element_size() for part in tensors if part is not None)

    def rows(self, rows: Tensor) -> Saliency:
        """Some rows of a batch."""
        assert isinstance(self.flops, Tensor)
        features = None if self.features is None else self.features[rows]
        return Saliency(self.received[rows], self.keys[rows], features, self.flops[rows])


def stack(images: Sequence[Mapping[str, Saliency]], tokens: int) -> dict[str, Saliency]:
    """The signals that all images have, as a batch padded to ``tokens``."""
    shared = set.intersection(*(set(image) for image in images))
    return {signal: _stack([image[signal] for image in images], tokens) for signal in sorted(shared)}


def _stack(parts: Sequence[Saliency], tokens: int) -> Saliency:
    def padded(values: Sequence[Tensor]) -> Tensor:
        out = values[0].new_zeros(len(values), tokens, *values[0].shape[1:])
        for row, value in enumerate(values):
            out[row, : len(value)] = value
        return out

    features = [part.features for part in parts if part.features is not None]
    return Saliency(
        padded([part.received for part in parts]),
        padded([part.keys for part in parts]),
        padded(features) if len(features) == len(parts) else None,
        torch.tensor([part.flops for part in parts], device=parts[0].received.device),
    )


@contextmanager
def hearing(modules: Mapping[str, nn.Module], inputs: Mapping[str, nn.Module]) -> Iterator[dict[str, Any]]:
    """Collects, while it lasts, what some modules return, and what others are called with as (args, kwargs)."""
    heard: dict[str, Any] = {}

    def keep_output(name: str) -> Callable[..., None]:
        return lambda module, args, output: heard.__setitem__(name, output)

    def keep_input(name: str) -> Callable[..., None]:
        return lambda module, args, kwargs: heard.__setitem__(name, (args, kwargs))

    handles = [module.register_forward_hook(keep_output(name)) for name, module in modules.items()]
    handles += [module.register_forward_pre_hook(keep_input(name), with_kwargs=True) for name, module in inputs.items()]
    try:
        yield heard
    finally:
        for handle in handles:
            handle.remove()


def first_row(q_bnC: Tensor, k_bnC: Tensor, heads: int) -> Tensor:
    """(b, n) attention of the first token, averaged over heads."""
    q_bH1W, k_bHnW = _split(q_bnC[:, :1], heads), _split(k_bnC, heads)
    logits = q_bH1W @ k_bHnW.transpose(2, 3) * q_bH1W.shape[3] ** -0.5
    return logits.float().softmax(-1).mean(1)[:, 0]


def mean_received(q_bnC: Tensor, k_bnC: Tensor, heads: int) -> Tensor:
    """(b, n) attention that each token receives, averaged over heads and over all tokens."""
    q_bHnW, k_bHnW = _split(q_bnC, heads), _split(k_bnC, heads)
    total_bn = torch.zeros(k_bnC.shape[:2], device=k_bnC.device)
    for rows in q_bHnW.split(CHUNK, dim=2):
        logits = rows @ k_bHnW.transpose(2, 3) * rows.shape[3] ** -0.5
        total_bn += logits.float().softmax(-1).mean(1).sum(1)
    return total_bn / q_bHnW.shape[2]


def _split(x_bnC: Tensor, heads: int) -> Tensor:
    return x_bnC.unflatten(2, (heads, -1)).transpose(1, 2)
