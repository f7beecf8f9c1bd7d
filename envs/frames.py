"""What a plan lets the language model see of an image, as a picture.

Shape legend: B rows, N visual tokens, n those of one image.
"""

from __future__ import annotations

import math

import numpy as np
from PIL import Image
from torch import Tensor

from maskgym.backbones.encodings.encoding import EncodingBank
from maskgym.common.errors import InputError

RENDER_MODES = ("rgb_array",)
SIDE = 256
"""Pixels of a frame's sides. Images are scaled to it, so that frames of several fit into one film or one picture."""


def checked_mode(render_mode: str | None) -> str | None:
    """The render mode, if there is such a one.

    Raises:
        InputError: another.
    """
    if render_mode is not None and render_mode not in RENDER_MODES:
        raise InputError(f"render_mode is {render_mode!r}; it must be {' or '.join(map(repr, RENDER_MODES))} or None")
    return render_mode


def frames(bank: EncodingBank, numbers: np.ndarray, tokens_BN: Tensor) -> list[np.ndarray]:
    """Frames (SIDE, SIDE, 3) uint8 of B queries, with the patches of dropped tokens dark.

    Args:
        bank: the queries.
        numbers: (B,) query numbers.
        tokens_BN: kept visual tokens.
    """
    there_BN = bank.gather(numbers).visual_valid_BN.cpu()
    return [
        _frame(bank.source[int(number)].the_image(), tokens_N[there_N].numpy())
        for number, tokens_N, there_N in zip(numbers, tokens_BN, there_BN, strict=True)
    ]


def _frame(image: Image.Image, tokens_n: np.ndarray) -> np.ndarray:
    shown = darkened(np.asarray(image.resize((SIDE, SIDE))), tokens_n)
    return np.asarray(Image.fromarray(shown).resize((SIDE, SIDE)))  # a strip below made it higher


def darkened(pixels: np.ndarray, tokens: np.ndarray) -> np.ndarray:
    """The image with the patches of dropped tokens dark; where tokens are no square grid, a strip below says which are
    kept."""
    side = math.isqrt(len(tokens))
    height, width = pixels.shape[:2]
    if side * side == len(tokens):
        rows, columns = (np.arange(size) * side // size for size in (height, width))
        kept = tokens.reshape(side, side)[rows][:, columns]
        return np.where(kept[..., None], pixels, pixels // 4)
    strip = tokens[np.arange(width) * len(tokens) // width]
    band = np.repeat(np.where(strip[None, :, None], 255, 40), max(2, height // 12), axis=0)
    return np.concatenate([pixels, np.broadcast_to(band, (*band.shape[:2], 3)).astype(pixels.dtype)])
