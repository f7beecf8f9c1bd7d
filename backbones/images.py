"""Reading an image file."""

from __future__ import annotations

from pathlib import Path
from typing import IO

from PIL import Image, UnidentifiedImageError

from backbones.errors import InputError

Image.init()
PICTURES = ("PNG", "JPEG", "MPO", "WEBP", "BMP", "DIB", "GIF", "TIFF", "PPM", "JPEG2000", "AVIF", "TGA", "ICO")
FORMATS = [kind for kind in PICTURES if kind in Image.OPEN]
"""What is decoded. Pillow knows others, and starts another program for some (Ghostscript, for EPS)."""

MOST_PIXELS = 89e6
"""Just below where Pillow begins to warn."""


def in_rgb(image: Image.Image, called: str) -> Image.Image:
    """A picture of somebody's, decoded by now and in RGB.

    Raises:
        InputError: one that is closed, or whose file is cut or gone.
    """
    try:
        return image.convert("RGB")
    except Exception as error:  # decoders meet what they do not expect, and raise many kinds
        raise InputError(f"{called} cannot be decoded ({error}); replace or remove it") from error


def read_image(file: str | Path | IO[bytes], called: str, most_pixels: float = MOST_PIXELS) -> Image.Image:
    """An image in RGB.

    Args:
        file: its path, or the open file.
        called: how messages call it, such as ``image a.png of query 'q7'``.
        most_pixels: a larger one is not decoded; files of a few kB can claim any size.

    Raises:
        InputError: no such file, one that cannot be decoded, or one that is too large.
    """
    try:
        with Image.open(file, formats=FORMATS) as opened:
            width, height = opened.size
            if width * height <= most_pixels:
                return opened.convert("RGB")
    except FileNotFoundError as error:
        raise InputError(f"{called} does not exist") from error
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:  # the latter where it is an error
        raise InputError(f"{called} is too large to be decoded ({error}); scale it down") from error
    except UnidentifiedImageError as error:
        raise InputError(
            f"{called} cannot be decoded (it is in no known image format); replace or remove it"
        ) from error
    except Exception as error:  # decoders meet what they do not expect, and raise many kinds
        raise InputError(f"{called} cannot be decoded ({error}); replace or remove it") from error
    raise InputError(
        f"{called} has {width:,} x {height:,} pixels; at most {most_pixels / 1e6:g} million are taken: scale it down"
    )
