"""Numbers that are not finite end a run before anything is learnt from them, and the message says whose they are.

Shape legend: B rows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import compress

import torch
from torch import Tensor

from maskgym.common.errors import InputError, queries_named


def check_finite(what: str, values: Tensor, ids: Sequence[str], advice: str) -> None:
    """Refuse rows with a number that is not finite.

    Args:
        what: the values are.
        values: (B, …).
        ids: of the B queries.
        advice: what to do about it.

    Raises:
        InputError: naming the rows' queries.
    """
    bad_B = ~values.detach().isfinite().reshape(len(values), -1).all(1)
    if bad_B.any():
        named = queries_named(list(compress(ids, bad_B.tolist())))
        raise InputError(f"{what} not finite in {int(bad_B.sum())} of {len(bad_B)} rows ({named}); {advice}")


def refuse_bad_gradients(optimizer: torch.optim.Optimizer, where: Callable[[], str]) -> None:
    """Let no step of an optimiser be taken along gradients that are not finite.

    Args:
        optimizer: looked at before each of its steps; weights and state stay as they are.
        where: what the message says of the place.

    Raises:
        InputError: by the step.
    """

    def check(*_: object) -> None:
        held = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        gradients = [parameter.grad for parameter in held if parameter.grad is not None]
        if not torch.nn.utils.get_total_norm(gradients).isfinite():
            raise InputError(f"gradients are not finite {where()}; lower --learning-rate")

    optimizer.register_step_pre_hook(check)
