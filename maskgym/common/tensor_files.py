"""What a safetensors file says of its tensors, before any of them is read."""

from __future__ import annotations

from pathlib import Path

from safetensors import safe_open

from maskgym.common.plain_files import check_regular


def tensor_shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """The shapes of a file's tensors, by name, from its header alone.

    Args:
        path: of the file.

    Raises:
        OSError: no such file, or no right to it.
        ValueError: no regular file.
        SafetensorError: no safetensors file, or one whose header does not fit its length.
    """
    check_regular(path)
    with safe_open(path, framework="pt") as file:
        return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
