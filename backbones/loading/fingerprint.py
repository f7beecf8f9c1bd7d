"""Telling the weights of one model from those of another of the same sizes."""

from __future__ import annotations

import hashlib

import numpy as np
import torch
from torch import Tensor, nn

SAMPLE = 65536
"""Weights of each tensor that are looked at, evenly spaced."""


def fingerprint(model: nn.Module) -> str:
    """32 hexadecimal digits: a digest of the signs of the weights.

    Signs stay when weights are rounded, so a model has one fingerprint in every dtype and on every device; training
    turns the signs of weights near zero. The names and the order of the tensors do not matter.
    """
    parts = sorted(_digest(weight.detach()) for weight in model.parameters())
    return hashlib.blake2b(b"".join(parts), digest_size=16).hexdigest()


def _digest(weight: Tensor) -> bytes:
    flat = weight.flatten()
    signs = torch.signbit(flat[:: max(1, -(-len(flat) // SAMPLE))]).cpu().numpy()
    return hashlib.blake2b(f"{tuple(weight.shape)}".encode() + np.packbits(signs).tobytes(), digest_size=16).digest()
