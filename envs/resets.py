"""What ``reset`` may be told of an episode in every skin, and the error of whoever does without one."""

from __future__ import annotations

from collections.abc import Mapping
from decimal import Decimal
from typing import Any

import gymnasium

from maskgym.common.errors import InputError, as_python

NAMES = ("query", "budget")


class ResetNeeded(InputError, gymnasium.error.ResetNeeded):
    """A step or a picture without an episode; Gymnasium's own error, too."""

    def __init__(self, what: str):
        super().__init__(f"{what} needs an episode, and none is running: call reset() first")


def fixed(options: Any, queries: int) -> tuple[int | None, float | None]:
    """The query number and the budget of one slot, None where they are to be drawn.

    Args:
        options: a dict of ``query`` and ``budget``, or None; values may be arrays of one number.
        queries: that the source has.

    Raises:
        InputError: no dict, an unknown option, a query number that the source does not have, or a budget outside
            (0, 1].
    """
    query, budget = (_number(value) for value in _checked(options).values())
    if query is not None and (type(query) is not int or not 0 <= query < queries):
        raise InputError(f"query number {query} does not exist; the source has {queries} queries")
    if budget is not None and (type(budget) not in (int, float, Decimal) or not 0 < budget <= 1):
        raise InputError(f"budget {budget} is outside (0, 1]; a budget is a share of the full plan's LLM FLOPs")
    return query, None if budget is None else float(budget)


def per_slot(options: Any, count: int) -> list[dict[str, Any]]:
    """Options of B slots, from a dict whose values are for all, or lists with one a slot.

    Raises:
        InputError: no dict, an unknown option, or a list of another length.
    """
    columns = {name: one_each(f"reset's option {name!r}", value, count) for name, value in _checked(options).items()}
    return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]


def one_each(what: str, value: Any, count: int) -> list[Any]:
    """A value for each of B slots: the elements of a sequence of B, or the same B times.

    Raises:
        InputError: a sequence of another length.
    """
    value = as_python(value)
    if not isinstance(value, list | tuple):
        return [value] * count
    if len(value) != count:
        raise InputError(f"{what} has {len(value)} values for {count} slots; give one, or one for each slot")
    return list(value)


def _checked(options: Any) -> dict[str, Any]:
    """Both options by name, None where they are not given."""
    if options is not None and not isinstance(options, Mapping):
        raise InputError(f"reset has the options {options!r}; give a dict of {' and '.join(NAMES)}")
    given = dict(options or {})
    unknown = [name for name in given if name not in NAMES]
    if unknown:
        raise InputError(f"reset has no option {unknown[0]!r}; it takes {' and '.join(NAMES)}")
    return {name: given.get(name) for name in NAMES}


def _number(value: Any) -> Any:
    """A Python number in place of NumPy's or torch's, or of an array of one."""
    value = as_python(value)
    while isinstance(value, list) and len(value) == 1:
        (value,) = value
    return value
