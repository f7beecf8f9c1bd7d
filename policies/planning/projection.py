"""The deterministic last step: drop the least confident units until the plan fits its budget.

Shape legend: B rows, A flat action length.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from maskgym.backbones.backbone import Backbone
from maskgym.backbones.encodings.encoding import Encoding
from maskgym.backbones.plans.masks import AXES, Masks
from maskgym.common.errors import InputError


def project(
    backbone: Backbone,
    masks: Masks,
    confidence_BA: Tensor,
    budgets_B: Tensor,
    encoding: Encoding,
    controller_flops: int | Tensor = 0,
    axes: Sequence[str] = AXES,
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
        axes: what may be dropped; units of other axes are kept.

    Raises:
        InputError: a budget below what the smallest plan costs, with the least budget; confidences or budgets of
            another shape.
    """
    layout = backbone.layout
    _check_shapes(confidence_BA, budgets_B, (len(encoding), layout.size))
    full_B = backbone.full_llm_flops(encoding)
    limits_B = budget_flops(budgets_B, full_B)
    least_B = _least_flops(backbone, encoding, controller_flops, axes)
    if (least_B > limits_B).any():
        row = int((least_B / full_B - budgets_B).argmax())
        raise InputError(
            f"budget {float(budgets_B[row]):g} is below the smallest plan's cost{_alone(axes)}; "
            f"the least budget here is {float(least_B[row]) / float(full_B[row]):.4f}"
        )
    bits_BA = layout.flatten(backbone.restrict(encoding, masks))
    droppable_BA = bits_BA & ~layout.protected(bits_BA.device, axes)
    rank_BA = _rank(confidence_BA, droppable_BA)

    def without(dropped_B: Tensor) -> Masks:
        return masks.with_bits(layout.unflatten(bits_BA & ~(droppable_BA & (rank_BA < dropped_B[:, None]))))

    # The fewest drops that fit: bisection.
    high_B = droppable_BA.sum(1)
    low_B = torch.zeros_like(high_B)
    while bool((low_B < high_B).any()):
        middle_B = (low_B + high_B) // 2
        fits_B = backbone.cost(encoding, without(middle_B), controller_flops).llm <= limits_B
        high_B = torch.where(fits_B, middle_B, high_B)
        low_B = torch.where(fits_B, low_B, (middle_B + 1).minimum(high_B))
    return without(high_B)


def _check_shapes(confidence_BA: Tensor, budgets_B: Tensor, expected: tuple[int, int]) -> None:
    if tuple(confidence_BA.shape) != expected:
        raise InputError(f"confidences have the shape {tuple(confidence_BA.shape)}; here it must be {expected}")
    if tuple(budgets_B.shape) != expected[:1]:
        raise InputError(f"budgets have the shape {tuple(budgets_B.shape)}; here it must be {expected[:1]}")


def least_share(
    backbone: Backbone, encoding: Encoding, controller_flops: int | Tensor = 0, axes: Sequence[str] = AXES
) -> Tensor:
    """(B,) float64: the smallest budget of each query that ``project`` accepts.

    Args:
        backbone: prices the plans.
        encoding: B queries.
        controller_flops: charged to the budget, one number or (B,).
        axes: what may be dropped.
    """
    # Half a FLOP more, so that rounding the budget down does not undo the division.
    least_B = _least_flops(backbone, encoding, controller_flops, axes).double() + 0.5
    return least_B / backbone.full_llm_flops(encoding)


def _least_flops(backbone: Backbone, encoding: Encoding, controller_flops: int | Tensor, axes: Sequence[str]) -> Tensor:
    """(B,) FLOPs with everything dropped that may be."""
    layout = backbone.layout
    kept_BA = layout.protected(encoding.visual_BND.device, axes).expand(len(encoding), -1)
    return backbone.cost(encoding, layout.unflatten(kept_BA), controller_flops).llm


def _alone(axes: Sequence[str]) -> str:
    return "" if set(axes) == set(AXES) else f" when only {' and '.join(axes)} may be dropped"


def _rank(confidence_BA: Tensor, droppable_BA: Tensor) -> Tensor:
    """(B, A) when each unit goes, from 0; whatever cannot be dropped comes after everything that can."""
    order_BA = confidence_BA.masked_fill(~droppable_BA, torch.inf).argsort(dim=1, stable=True)
    places_BA = torch.arange(order_BA.shape[1], device=order_BA.device).expand_as(order_BA)
    return torch.empty_like(order_BA).scatter_(1, order_BA, places_BA)


def budget_flops(budgets_B: Tensor, full_B: Tensor) -> Tensor:
    """(B,) int64: the most FLOPs that each query may spend. Rounded down, so a plan that fits never exceeds."""
    return (budgets_B.double() * full_B.double()).floor().long()
