"""Reading images: of any of Pillow's modes, files and arrays, as the picture that a person sees, in RGB."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import IO

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError
from PIL.ExifTags import Base as Exif

from maskgym.common.errors import InputError

Image.init()
PICTURES = ("PNG", "JPEG", "MPO", "WEBP", "BMP", "DIB", "GIF", "TIFF", "PPM", "JPEG2000", "AVIF", "TGA", "ICO")
FORMATS = [kind for kind in PICTURES if kind in Image.OPEN]
"""What is decoded. Pillow knows others, and starts another program for some (Ghostscript, for EPS)."""

MOST_PIXELS = 89e6
"""Just below where Pillow begins to warn."""

LONGEST_PATH = 200
"""Characters of a path that a message quotes."""

LINK = re.compile(r"^[A-Za-z][A-Za-z0-9+.-]*://")
NO_PATH = rf"{LINK.pattern}|^(data:|/9j/|iVBORw0KGgo|R0lGOD|UklGR)"
"""How a text begins that is no path: a link, a data URI, or the base64 of a JPEG, PNG, GIF or WebP."""


def read_image(file: str | Path | IO[bytes], called: str, most_pixels: float = MOST_PIXELS) -> Image.Image:
    """An image file as ``upright_rgb`` shows it; of an animation the first picture.

    Args:
        file: its path, or the open file.
        called: how messages call it, such as ``image a.png of query 'q7'``.
        most_pixels: a larger one is not decoded; files of a few kB can claim any size.

    Raises:
        InputError: no such file, a text that is no path, a file that cannot be decoded, or one that is too large.
    """
    if isinstance(file, str):
        check_path(file, called)
    try:
        with Image.open(file, formats=FORMATS) as opened:
            width, height = opened.size
            if width * height <= most_pixels:
                shown = upright_rgb(opened, called)
                return shown.copy() if shown is opened else shown
    except InputError:
        raise
    except FileNotFoundError as error:
        raise InputError(f"{called} does not exist") from error
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:  # the latter where it is an error
        raise InputError(f"{called} is too large to be decoded ({error}); scale it down") from error
    except UnidentifiedImageError as error:
        raise InputError(
            f"{called} cannot be decoded (it is in no known image format); replace or remove it"
        ) from error
    except Exception as error:  # decoders meet what they do not expect, and raise many kinds
        raise _undecodable(called, error) from error
    raise InputError(
        f"{called} has {width:,} x {height:,} pixels; at most {most_pixels / 1e6:g} million are taken: scale it down"
    )


def upright_rgb(image: Image.Image, called: str) -> Image.Image:
    """An image in RGB, turned as its camera says, on white where it is transparent (as ``convert_to_rgb`` of
    ``transformers`` has it), and in 8 bits (``in_8_bits``); the same object where it is so already.

    Args:
        image: of any of Pillow's modes.
        called: how messages call it.

    Raises:
        InputError: an image that cannot be decoded, without pixels, or with values that are no brightness.
    """
    try:
        image.load()  # before its orientation is read: Pillow turns TIFF files in loading
        if 0 in image.size:
            raise InputError(f"{called} has no pixels; replace or remove it")
        if image.getexif().get(Exif.Orientation, 1) != 1:
            image = ImageOps.exif_transpose(image)
        if image.mode[0] in "IF":
            image = Image.fromarray(in_8_bits(np.asarray(image), called))
        if image.has_transparency_data:
            image = _on_white(image)
        return image if image.mode == "RGB" else image.convert("RGB")
    except InputError:
        raise
    except Exception as error:  # a file that is opened is decoded only here
        raise _undecodable(called, error) from error


def image_of(pixels: np.ndarray, called: str) -> Image.Image:
    """An array as an image in RGB.

    Args:
        pixels: (height, width), or (height, width, 1 to 4): grey, grey and alpha, RGB, RGB and alpha; booleans, whole
            numbers or floats.
        called: how messages call it.

    Raises:
        InputError: another shape, or values that are no brightness.
    """
    channels = pixels.shape[2:] or (1,)
    if pixels.ndim not in (2, 3) or channels[0] not in (1, 2, 3, 4) or pixels.dtype.kind not in "buif":
        raise InputError(
            f"{called} is an array of {pixels.dtype}, of shape {pixels.shape}; it must hold numbers, of shape (height, "
            "width) or (height, width, 1 to 4 channels): transpose it"
        )
    pixels = pixels[..., 0] if pixels.shape[2:] == (1,) else pixels
    pixels = pixels if pixels.dtype == np.uint8 else in_8_bits(pixels, called)
    return upright_rgb(Image.fromarray(np.ascontiguousarray(pixels)), called)


def in_8_bits(values: np.ndarray, called: str) -> np.ndarray:
    """Brightness as uint8, by the range that the largest value is in: 0 to 1 (booleans and floats alone), 0 to 255, or
    0 to 65,535, of which the upper 8 bits stay, as Pillow does with colours of 16 bits. Pillow itself cuts off what is
    above 255.

    Raises:
        InputError: values in none of these ranges, or not finite.
    """
    if values.size == 0:
        return values.astype(np.uint8)
    low, high = values.min(), values.max()
    if not (low >= 0 and high <= 65535):
        raise InputError(
            f"{called} has values from {low:g} to {high:g}; they must be within 0 to 1, 0 to 255, or 0 to 65535: scale "
            "them"
        )
    if high > 255:
        values = values // 256
    elif values.dtype.kind in "bf" and high <= 1:
        values = np.round(values * 255.0)
    return np.round(values).astype(np.uint8)


def shown_path(path: str) -> str:
    """A path as messages quote it: its end alone, if it is long."""
    return path if len(path) <= LONGEST_PATH else f"…{path[-LONGEST_PATH:]}"


def is_no_path(text: str) -> bool:
    """Whether a text that stands for an image is a link, or the picture itself."""
    return re.match(NO_PATH, text) is not None and not os.path.exists(text)


def check_path(text: str, called: str) -> None:
    """Refuse a text that stands for an image and is no path.

    Raises:
        InputError: a link, or a picture written as text.
    """
    if LINK.match(text):
        raise InputError(f"{called} is a link; download the image, and give the path of its file")
    if is_no_path(text):
        raise InputError(f"{called} is an image written as text (base64); decode it, and give its bytes or a file")


def _on_white(image: Image.Image) -> Image.Image:
    image = (image.convert("LA") if image.mode == "La" else image).convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)


def _undecodable(called: str, error: Exception) -> InputError:
    reason = (isinstance(error, OSError) and error.strerror) or str(error) or type(error).__name__
    return InputError(f"{called} cannot be decoded ({reason}); replace or remove it")
