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

REACH = 12.0
"""Temperatures beyond the outermost logits to which shifts are sought: there a gate is 6e-6 from shut or open."""
PRECISION = 2e-7
"""Of shifts, relative to their size or the temperature, and of log-odds: where float32 ends."""
MOST_STEPS = 60


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

    def spent(shift_B: Tensor, logits_BK: Tensor) -> Tensor:
        shifted_BK = (logits_BK - shift_B[:, None].to(logits_BK.dtype)) / temperature
        return price(shifted_BK.sigmoid().where(free_BK, 1.0))

    fixed_BK, limits_B = logits_BK.detach().double(), limits_B.detach().double()
    reach = REACH * temperature
    low_B, high_B = fixed_BK.amin(1) - reach, fixed_BK.amax(1) + reach
    with torch.no_grad():
        shift_B = _solve(lambda shift_B: spent(shift_B, fixed_BK), limits_B, low_B, high_B, temperature)
    if torch.is_grad_enabled() and logits_BK.requires_grad:
        shift_B = _with_derivative(shift_B, lambda logits_BK: spent(shift_B, logits_BK), logits_BK, limits_B)
    return logits_BK - shift_B[:, None].to(logits_BK.dtype)


def _with_derivative(shift_B: Tensor, spent: Price, logits_BK: Tensor, limits_B: Tensor) -> Tensor:
    """The shifts, as a function of the logits: one Newton step from the solution is worth nothing, and has the
    derivative of the solution itself."""
    over_B = spent(logits_BK) - limits_B
    # A shift lowers all logits of its row alike.
    (slopes_BK,) = torch.autograd.grad(over_B.sum(), logits_BK, retain_graph=True)
    slope_B = -slopes_BK.double().sum(1)
    # Nothing moves where next to nothing is spent by a shift, or where the limit cannot be met.
    moves_B = (slope_B < -1.0) & (over_B.detach().abs() < 1e-3 * limits_B)
    return shift_B - (over_B - over_B.detach()) / slope_B.where(moves_B, -torch.inf)


def _solve(
    spent: Callable[[Tensor], Tensor], limits_B: Tensor, low_B: Tensor, high_B: Tensor, temperature: float
) -> Tensor:
    """(B,) float64 shifts at which the limits are spent, as precisely as float32 logits tell shifts apart.

    Sought is where the log-odds of the share that is spent, between what the two ends spend, are those of the limit's:
    they are nearly straight in the shift, so interpolation finds it in a few steps (Chandrupatla 1997: inverse
    quadratic where that is safe, else halving). A row that is found stays as it is: it does not depend on the others.

    Args:
        spent: (B,) FLOPs at (B,) shifts, falling.
        limits_B: FLOPs.
        low_B, high_B: between which shifts are sought; the nearer one where the limit is not between what they spend.
        temperature: of the gates.
    """
    most_B, least_B = spent(low_B), spent(high_B)
    range_B = (most_B - least_B).clamp_min(1.0)

    def log_odds(flops_B: Tensor) -> Tensor:
        return ((flops_B - least_B) / range_B).clamp(1e-12, 1 - 1e-12).logit()

    target_B = log_odds(limits_B)
    newest, behind = low_B, high_B
    f_newest, f_behind = log_odds(most_B) - target_B, log_odds(least_B) - target_B
    found_B = low_B.where(limits_B >= most_B, high_B)
    open_B = (limits_B < most_B) & (limits_B > least_B)
    share_B = f_newest / (f_newest - f_behind).where(open_B, 1.0)  # the first step interpolates
    for _ in range(MOST_STEPS):
        if not bool(open_B.any()):
            break
        at = newest + share_B * (behind - newest)
        f_at = log_odds(spent(at)) - target_B
        same = f_at.sign() == f_newest.sign()
        before, f_before = newest.where(same, behind), f_newest.where(same, f_behind)
        behind, f_behind = behind.where(same, newest), f_behind.where(same, f_newest)
        newest, f_newest = at, f_at
        best = newest.where(f_newest.abs() < f_behind.abs(), behind)
        precision = PRECISION * best.abs().clamp_min(temperature)
        width = (behind - newest).abs().clamp_min(torch.finfo(torch.float64).tiny)
        near = f_newest.abs().minimum(f_behind.abs()) < PRECISION
        done = open_B & (near | (width < 2 * precision))
        found_B, open_B = best.where(done, found_B), open_B & ~done
        share_B = _next_share(newest, behind, before, f_newest, f_behind, f_before)
        edge = (precision / width).clamp_max(0.5)
        share_B = share_B.clamp(edge, 1 - edge)
    return newest.where(open_B, found_B)


def _next_share(x1: Tensor, x2: Tensor, x3: Tensor, f1: Tensor, f2: Tensor, f3: Tensor) -> Tensor:
    """(B,) where between x1 and x2 to look next: Chandrupatla's criterion, all (B,)."""
    xi, phi = (x1 - x2) / (x3 - x2), (f1 - f2) / (f3 - f2)
    safe = (phi.square() < xi) & ((1 - phi).square() < 1 - xi)
    quadratic = f1 / (f2 - f1) * f3 / (f2 - f3) + (x3 - x1) / (x2 - x1) * f1 / (f3 - f1) * f2 / (f3 - f2)
    return quadratic.where(safe & quadratic.isfinite(), 0.5)
