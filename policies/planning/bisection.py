"""The largest whole numbers that fit, row by row.

Shape legend: B rows.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def most_that_fits(fits: Callable[[Tensor], Tensor], low_B: Tensor, high_B: Tensor) -> Tensor:
    """(B,) the largest numbers from ``low_B`` to ``high_B`` that fit, by bisection; the low ends are taken to fit.

    Args:
        fits: (B,) bool for (B,) numbers; what fits also does with a smaller number.
        low_B, high_B: int64 bounds, both included.
    """
    while bool((low_B < high_B).any()):
        middle_B = (low_B + high_B + 1) // 2
        fits_B = fits(middle_B)
        low_B, high_B = torch.where(fits_B, middle_B, low_B), torch.where(fits_B, high_B, middle_B - 1)
    return low_B
