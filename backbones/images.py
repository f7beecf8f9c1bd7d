"""Reading an image file."""

from __future__ import annotations

from pathlib import Path
from typing import IO

from PIL import Image, UnidentifiedImageError

from backbones.errors import InputError


def read_image(file: str | Path | IO[bytes], called: str) -> Image.Image:
    """An image in RGB.

    Args:
        file: its path, or the open file.
        called: how messages call it, such as ``image a.png of query 'q7'``.

    Raises:
        InputError: no such file, or one that cannot be decoded.
    """
    try:
        return Image.open(file).convert("RGB")
    except FileNotFoundError as error:
        raise InputError(f"{called} does not exist") from error
    except (UnidentifiedImageError, Image.DecompressionBombError, OSError, SyntaxError, ValueError) as error:
        raise InputError(f"{called} cannot be decoded ({error}); replace or remove it") from error
