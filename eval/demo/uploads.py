"""Images from visitors, within limits."""

from __future__ import annotations

import hashlib
import io

from maskgym.backbones.encodings.encoding import Query
from maskgym.backbones.encodings.images import read_image
from maskgym.common.errors import InputError


def uploaded_query(content: bytes, name: str, question: str, megabytes: float, megapixels: float) -> Query:
    """A query about an uploaded image.

    Args:
        content: of the file.
        name: of the file.
        question: about it.
        megabytes: largest file, in millions of bytes.
        megapixels: largest image, in millions of pixels.

    Raises:
        InputError: a file that is too large, or no image.
    """
    called = f"upload {name!r}"
    if len(content) > 1e6 * megabytes:
        raise InputError(f"{called} has {len(content) / 1e6:.1f} MB; at most {megabytes:g} are taken: scale it down")
    image = read_image(io.BytesIO(content), called, 1e6 * megapixels)
    return Query(name, image, question, image_key=hashlib.blake2b(content, digest_size=16).digest())
