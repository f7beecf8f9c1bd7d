"""Some tokens of each row, as many as the row with most has, and back.

Shape legend: B rows, N tokens, M picked tokens of the row with most, D any width.
"""

from __future__ import annotations

import torch
from torch import Tensor


def pick(x_BND: Tensor, chosen_BN: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The chosen tokens in order.

    Returns:
        The tokens (B, M, D), their numbers (B, M), and (B, M) bool which of them are really chosen; rows with fewer
        than M are filled up with others.
    """
    most = int(chosen_BN.sum(1).max())
    numbers_BM = chosen_BN.long().argsort(dim=1, descending=True, stable=True)[:, :most]
    picked_BMD = x_BND.gather(1, numbers_BM[..., None].expand(-1, -1, x_BND.shape[2]))
    return picked_BMD, numbers_BM, chosen_BN.gather(1, numbers_BM)


def put(x_BND: Tensor, numbers_BM: Tensor, chosen_BM: Tensor, new_BMD: Tensor) -> Tensor:
    """A copy of the tokens with the picked ones replaced."""
    rows_BM = torch.arange(len(x_BND), device=x_BND.device)[:, None].expand_as(numbers_BM)
    return x_BND.index_put((rows_BM[chosen_BM], numbers_BM[chosen_BM]), new_BMD[chosen_BM].to(x_BND.dtype))
