"""``--deterministic``: equal runs to the last bit, or an error where PyTorch has no such implementation."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from maskgym.common.errors import InputError

WORKSPACE = "CUBLAS_WORKSPACE_CONFIG"


@contextmanager
def deterministic(wanted: bool) -> Iterator[None]:
    """Within the block, if it is wanted, operations without a deterministic implementation are refused.

    What cuBLAS needs for it (``CUBLAS_WORKSPACE_CONFIG``) is set where the environment does not say otherwise; CUDA
    must not have been used before. See https://docs.pytorch.org/docs/stable/notes/randomness.html

    Raises:
        InputError: such an operation.
    """
    if not wanted:
        yield
        return
    os.environ.setdefault(WORKSPACE, ":4096:8")
    before, warns = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        yield
    except RuntimeError as error:
        if "deterministic" not in str(error):
            raise
        raise InputError(f"{error} (leave out --deterministic to go on without)") from error
    finally:
        torch.use_deterministic_algorithms(before, warn_only=warns)
