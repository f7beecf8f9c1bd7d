"""The deterministic last step: drop the least confident units until the plan fits its budget.

Shape legend: B rows, A flat action length.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from backbones.backbone import Backbone
from backbones.encoding import Encoding
from backbones.errors import InputError
from backbones.latency_model import LatencyModel
from backbones.masks import Masks


def project(
    backbone: Backbone,
    masks: Masks,
    confidence_BA: Tensor,
    budgets_B: Tensor,
    encoding: Encoding,
    controller_flops: int | Tensor = 0,
) -> Masks:
    """Make every plan fit its budget by dropping its least confident kept units.

    For fixed masks and confidences a larger budget keeps a superset. Protected units are never dropped.

    Args:
        backbone: prices the plans.
        masks: B plans.
        confidence_BA: one number a unit in flat-action order; the lowest go first.
        budgets_B: share of the full plan's LLM FLOPs, in (0, 1].
        encoding: B queries.
        controller_flops: charged to the budget, one number or (B,).

    Raises:
        InputError: a budget below what the smallest plan costs; the message names the least budget.
    """
    full_B = backbone.full_llm_flops(encoding)

    def spent(plans: Masks) -> Tensor:
        return backbone.cost(encoding, plans, controller_flops).llm

    projected, least_B = drop_until(backbone, masks, confidence_BA, encoding, spent, budget_flops(budgets_B, full_B))
    if least_B is not None:
        row = int((least_B / full_B - budgets_B).argmax())
        raise InputError(
            f"budget {float(budgets_B[row]):g} is below the smallest plan's cost; "
            f"the least budget here is {float(least_B[row]) / float(full_B[row]):.4f}"
        )
    return projected


def project_to_milliseconds(
    backbone: Backbone,
    masks: Masks,
    confidence_BA: Tensor,
    milliseconds_B: Tensor,
    encoding: Encoding,
    latency: LatencyModel,
) -> Masks:
    """As ``project``, with the budget in milliseconds of prefill as the latency model predicts it.

    Raises:
        InputError: a budget below the smallest plan's predicted time.
    """

    def spent(plans: Masks) -> Tensor:
        return latency.predict(backbone, encoding, plans)

    projected, least_B = drop_until(backbone, masks, confidence_BA, encoding, spent, milliseconds_B)
    if least_B is not None:
        row = int((least_B - milliseconds_B).argmax())
        raise InputError(
            f"a budget of {float(milliseconds_B[row]):g} ms is below the smallest plan's prefill on {latency.device}, "
            f"{float(least_B[row]):.3g} ms"
        )
    return projected


def drop_until(
    backbone: Backbone,
    masks: Masks,
    confidence_BA: Tensor,
    encoding: Encoding,
    spent: Callable[[Masks], Tensor],
    limits_B: Tensor,
) -> tuple[Masks, Tensor | None]:
    """Drop the least confident units until ``spent``, which must not grow with a drop, is within ``limits_B``.

    Returns:
        The plans, and None; or, if some row cannot fit, the least that each row can spend (B,).
    """
    layout = backbone.layout
    bits_BA = layout.flatten(backbone.restrict(encoding, masks))
    droppable_BA = bits_BA & ~layout.protected(bits_BA.device)
    counts_B = droppable_BA.sum(1)
    # Rank 0 goes first. Whatever cannot be dropped ranks behind everything that can.
    order_BA = confidence_BA.masked_fill(~droppable_BA, torch.inf).argsort(dim=1, stable=True)
    places_BA = torch.arange(layout.size, device=bits_BA.device).expand_as(order_BA)
    rank_BA = torch.empty_like(order_BA).scatter_(1, order_BA, places_BA)

    def without(dropped_B: Tensor) -> Masks:
        return layout.unflatten(bits_BA & ~(droppable_BA & (rank_BA < dropped_B[:, None])))

    least_B = spent(without(counts_B))
    if (least_B > limits_B).any():
        return masks, least_B
    # The fewest drops that fit: bisection.
    low_B, high_B = torch.zeros_like(counts_B), counts_B
    while bool((low_B < high_B).any()):
        middle_B = (low_B + high_B) // 2
        fits_B = spent(without(middle_B)) <= limits_B
        high_B = torch.where(fits_B, middle_B, high_B)
        low_B = torch.where(fits_B, low_B, (middle_B + 1).minimum(high_B))
    return without(high_B), None


def budget_flops(budgets_B: Tensor, full_B: Tensor) -> Tensor:
    """(B,) int64: the most FLOPs that each query may spend. Rounded down, so a plan that fits never exceeds."""
    return (budgets_B.double() * full_B.double()).floor().long()
