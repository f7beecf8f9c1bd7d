"""Two images as one, for queries about a pair: a VLM here takes one image a query."""

from __future__ import annotations

from PIL import Image

GAP = 16
"""White columns between them, in pixels."""


def side_by_side(left: Image.Image, right: Image.Image) -> Image.Image:
    """The images beside each other, scaled down to the height of the lower one, with a white gap."""
    height = min(left.height, right.height)
    scaled = [image.resize((max(1, round(image.width * height / image.height)), height)) for image in (left, right)]
    both = Image.new("RGB", (scaled[0].width + GAP + scaled[1].width, height), "white")
    both.paste(scaled[0], (0, 0))
    both.paste(scaled[1], (scaled[0].width + GAP, 0))
    return both
