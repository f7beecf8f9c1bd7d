"""Spending a budget in expectation: logits shifted, row by row, until the plan that they stand for costs its limit.

The shift is a function of the logits, so probabilities and gates that are made from shifted logits have exact
derivatives: the price of one unit's gain is what the others lose.

Shape legend: B rows, K units of a level.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

Price = Callable[[Tensor], Tensor]
"""From gates (B, K) in [0, 1] to FLOPs (B,), rising with every gate."""


def fill(logits_BK: Tensor, free_BK: Tensor, price: Price, limits_B: Tensor, temperature: float = 1.0) -> Tensor:
    """(B, K) logits minus a shift per row, such that the sigmoids' price is the row's limit.

    Where even everything is within the limit, or nothing is, the shift is as far as it is sought.

    Args:
        logits_BK: of the units.
        free_BK: bool; the gates of the others are 1.
        price: of the gates.
        limits_B: FLOPs.
        temperature: the gates are sigmoid((logits - shift) / temperature).
    """

    def gates(shift_B: Tensor, logits_BK: Tensor) -> Tensor:
        shifted_BK = (logits_BK - shift_B[:, None].to(logits_BK.dtype)) / temperature
        return shifted_BK.sigmoid().where(free_BK, 1.0)

    fixed_BK = logits_BK.detach()
    shift_B = _solve(lambda shift_B: price(gates(shift_B, fixed_BK)), limits_B.detach().double(), fixed_BK, temperature)
    slope_B = _slope(lambda shift_B: price(gates(shift_B, fixed_BK)), shift_B)
    over_B = price(gates(shift_B, logits_BK)) - limits_B
    # Nothing moves where the limit cannot be met.
    slope_B = slope_B.where(over_B.detach().abs() < 1e-3 * limits_B.detach(), -torch.inf)
    # One Newton step from the solution: worth nothing, with the derivative of the solution itself.
    shift_B = shift_B - (over_B - over_B.detach()) / slope_B
    return logits_BK - shift_B[:, None].to(logits_BK.dtype)


def _solve(
    spent: Callable[[Tensor], Tensor], limits_B: Tensor, logits_BK: Tensor, temperature: float, halvings: int = 40
) -> Tensor:
    """(B,) float64 shifts at which the limits are spent, by bisection."""
    reach = 12 * temperature
    low_B = logits_BK.amin(1).double() - reach
    high_B = logits_BK.amax(1).double() + reach
    with torch.no_grad():
        for _ in range(halvings):
            middle_B = (low_B + high_B) / 2
            over_B = spent(middle_B) > limits_B
            low_B, high_B = torch.where(over_B, middle_B, low_B), torch.where(over_B, high_B, middle_B)
    return high_B


def _slope(spent: Callable[[Tensor], Tensor], shift_B: Tensor) -> Tensor:
    """(B,) derivative of what is spent by the shift; infinite where there is next to none."""
    with torch.enable_grad():
        at_B = shift_B.detach().requires_grad_()
        (slope_B,) = torch.autograd.grad(spent(at_B).sum(), at_B)
    return slope_B.where(slope_B < -1.0, -torch.inf)
