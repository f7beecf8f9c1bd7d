"""Reading an image file."""

from __future__ import annotations

import math
from pathlib import Path
from typing import IO

from PIL import Image, UnidentifiedImageError

from backbones.errors import InputError


def read_image(file: str | Path | IO[bytes], called: str, most_pixels: float = math.inf) -> Image.Image:
    """An image in RGB.

    Args:
        file: its path, or the open file.
        called: how messages call it, such as ``image a.png of query 'q7'``.
        most_pixels: a larger one is not decoded.

    Raises:
        InputError: no such file, one that cannot be decoded, or one that is too large.
    """
    try:
        with Image.open(file) as opened:
            width, height = opened.size
            if width * height <= most_pixels:
                return opened.convert("RGB")
    except FileNotFoundError as error:
        raise InputError(f"{called} does not exist") from error
    except UnidentifiedImageError as error:
        raise InputError(
            f"{called} cannot be decoded (it is in no known image format); replace or remove it"
        ) from error
    except Exception as error:  # decoders meet what they do not expect, and raise many kinds
        raise InputError(f"{called} cannot be decoded ({error}); replace or remove it") from error
    raise InputError(
        f"{called} has {width:,} x {height:,} pixels; at most {most_pixels / 1e6:g} million are taken: scale it down"
    )
