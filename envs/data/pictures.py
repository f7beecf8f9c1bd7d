"""Cells of a table that hold an image, in any of the forms that ``datasets`` knows, decoded one by one."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Hashable
from dataclasses import dataclass
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from PIL import Image

from maskgym.backbones.encodings.images import NO_PATH, check_path, image_of, read_image, shown_path
from maskgym.common.errors import InputError
from maskgym.envs.data.cells import is_text

IMAGES = ("image", "beside")
"""The columns that hold images."""


@dataclass(frozen=True)
class Picture:
    """An image as a cell has it; one of the three is given.

    Attributes:
        path: of its file.
        content: of its file.
        pixels: an array.
    """

    path: str | None = None
    content: bytes | None = None
    pixels: np.ndarray | None = None

    @property
    def key(self) -> Hashable:
        """Equal for equal images: the path, or a digest of the content."""
        if self.pixels is not None:
            return hashlib.blake2b(repr(self.pixels.shape).encode() + self.pixels.tobytes(), digest_size=16).digest()
        return self.path if self.content is None else hashlib.blake2b(self.content, digest_size=16).digest()

    def decoded(self, called: str) -> Image.Image:
        """The image, upright, in RGB.

        Args:
            called: how messages call it.

        Raises:
            InputError: no such file, or something that is no image.
        """
        if self.pixels is not None and self.pixels.ndim == 1:
            raise InputError(f"{called} has rows of several lengths; an array of pixels needs one shape")
        if self.pixels is not None:
            return image_of(self.pixels, called)
        if self.content is not None:
            return read_image(io.BytesIO(self.content), called)
        assert self.path is not None
        return read_image(self.path, called)

    def called(self, row: int) -> str:
        """How messages call it."""
        return f"image {shown_path(self.path) if self.path else f'row {row}'}"


class Pictures:
    """A column of images: of paths, of bytes, of both as ``datasets.Image`` stores them, or of arrays of pixels
    (``datasets.Array3D``, or nested lists).

    Args:
        column: as ``datasets`` stores it.
        feature: its type in ``datasets``.
        data: name of the data set.
        name: of the column.

    Raises:
        InputError: a column of another type, links, or images written as text.
    """

    def __init__(self, column: pa.ChunkedArray, feature: Any, data: str, name: str):
        if not _holds_images(column.type, feature):
            raise InputError(
                f"data {data!r}: the column {name!r} is {feature}; it must hold one image a row, several images a "
                "query are not supported"
            )
        self.column, self.are_arrays = column, is_array(column.type)
        for row in self._no_paths():
            picture = self[row]
            check_path((picture and picture.path) or "", f"data {data!r}, row {row}: {name}")

    def __getitem__(self, row: int) -> Picture | None:
        """What a row has; None where it has no image."""
        cell = self.column[row]
        if not cell.is_valid:
            return None
        if self.are_arrays:
            return Picture(pixels=_pixels(cell))
        value = cell.as_py()
        given = value if isinstance(value, dict) else {"bytes" if isinstance(value, bytes) else "path": value}
        path, content = given.get("path") or None, given.get("bytes")
        return None if path is None and content is None else Picture(path, content)

    def _no_paths(self) -> list[int]:
        """Rows whose path is none, in all likelihood. Where there are bytes, the path is but a name."""
        kind, paths = self.column.type, self.column
        if pa.types.is_struct(kind):
            bytes_, path = (kind.get_field_index(field) >= 0 for field in ("bytes", "path"))
            paths = pc.struct_field(self.column, "path") if path else pa.chunked_array([], pa.null())
            if bytes_ and path:
                paths = pc.if_else(pc.is_null(pc.struct_field(self.column, "bytes")), paths, None)
        if not is_text(paths.type):
            return []
        wrong = pc.match_substring_regex(paths.cast(pa.string()), NO_PATH)
        return np.flatnonzero(pc.fill_null(wrong, False).to_numpy()).tolist()


def is_array(kind: pa.DataType) -> bool:
    """Whether cells of an Arrow type are lists, whatever they hold."""
    return isinstance(kind, pa.BaseExtensionType) or (hasattr(kind, "value_type") and not pa.types.is_dictionary(kind))


def _holds_images(kind: pa.DataType, feature: Any) -> bool:
    if pa.types.is_struct(kind):
        fields = {field.name for field in kind}
        return isinstance(feature, datasets.Image | dict) and not fields.isdisjoint(("bytes", "path"))
    if isinstance(kind, pa.BaseExtensionType):
        return isinstance(feature, datasets.Array2D | datasets.Array3D)
    depth = 0
    while is_array(kind):
        kind, depth = kind.value_type, depth + 1
    if depth:
        numbers = pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_boolean(kind)
        return numbers and depth in (2, 3)
    return is_text(kind) or pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_null(kind)


def _pixels(cell: Any) -> np.ndarray:
    """The array that nested lists hold, without making a Python object of every number."""
    values = (cell.value if isinstance(cell, pa.ExtensionScalar) else cell).values
    shape = [len(values)]
    while is_array(values.type):
        lengths = pc.unique(pc.list_value_length(values)).to_pylist()
        if len(lengths) != 1 or lengths[0] is None:
            return np.empty(0)  # of no one shape
        shape.append(lengths[0])
        values = values.flatten()
    return values.to_numpy(zero_copy_only=False).reshape(shape)
