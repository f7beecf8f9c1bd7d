"""Rewards by name, by dotted path ``package.module:function``, or as a weighted sum of several, each written
``WEIGHT*NAME``: ``["accuracy", "-0.2*flops"]``; all of them checked.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np

from maskgym.common.errors import InputError, printable, queries_named, was_interrupted
from maskgym.common.naming import import_dotted
from maskgym.common.time_limit import TimeLimitError, check_seconds, within
from maskgym.envs.rewards import ADAPTIVE, REWARDS, Reward, RewardTerms


class WeightedReward:
    """A weighted sum of rewards, each checked: right shape, finite.

    Args:
        parts: ``NAME``, ``package.module:function``, or either behind ``WEIGHT*``; one, or several to be summed.
        seconds: that each may take for a batch; 0: any time. See ``maskgym.common.time_limit`` for what is stopped.

    Raises:
        InputError: an unknown name, a path that cannot be imported, a weight that is no number, or no time limit.
    """

    def __init__(self, parts: str | Sequence[str] | Reward, seconds: float = 0):
        check_seconds("reward_seconds", seconds)
        self.seconds = seconds
        if callable(parts):
            self.parts: list[tuple[str, float, Reward]] = [(_name(parts), 1.0, parts)]
            return
        specs = list(parts) if isinstance(parts, Iterable) and not isinstance(parts, str) else [parts]
        if not specs:
            known = ", ".join([*REWARDS, *ADAPTIVE])
            raise InputError(f"no reward given; use one of {known}, or package.module:function")
        self.parts = [_parse(spec) for spec in specs]

    def __call__(self, terms: RewardTerms, ids: Sequence[str] = ()) -> np.ndarray:
        """(B,) float64.

        Args:
            terms: the raw terms.
            ids: query ids, named in errors.

        Raises:
            InputError: a reward that raises, takes too long, or returns another shape or a value that is not finite.
        """
        total = np.zeros(len(terms))
        for name, weight, function in self.parts:
            total += weight * self._evaluate(name, function, terms, ids)
        return total

    def state(self) -> list[Any]:
        """What a checkpoint keeps of rewards that change: of each part what its ``state()`` gives, or None.

        Raises:
            InputError: a ``state()`` that raises, takes too long, or gives what is no JSON.
        """
        return [self._state(name, function) for name, _, function in self.parts]

    def load_state(self, states: Sequence[Any]) -> None:
        """Continue from ``state()``, by each part's ``load_state``."""
        for (_, _, function), state in zip(self.parts, states, strict=True):
            if state is not None:
                function.load_state(state)  # type: ignore[attr-defined]

    def _evaluate(self, name: str, function: Reward, terms: RewardTerms, ids: Sequence[str]) -> np.ndarray:
        """(B,) float64 of one part."""
        values: np.ndarray = _within(
            self.seconds, name, lambda: np.asarray(function(terms), dtype=np.float64), queries_named(ids)
        )
        if values.shape != (len(terms),):
            raise InputError(
                f"reward {name!r} returned shape {values.shape}; it must return one number a row, ({len(terms)},)"
            )
        bad = np.flatnonzero(~np.isfinite(values))
        if len(bad):
            where = queries_named([ids[row] for row in bad.tolist()] if len(ids) else [])
            raise InputError(f"reward {name!r} returned {values[bad[0]]} in {len(bad)} of {len(terms)} rows ({where})")
        return values

    def _state(self, name: str, function: Reward) -> Any:
        if not hasattr(function, "state"):
            return None
        state = _within(self.seconds, name, function.state, "in its state()")
        try:
            json.dumps(state)
        except (TypeError, ValueError, RecursionError) as error:
            raise InputError(
                f"reward {name!r} has a state() that is no JSON ({printable(str(error))}); give numbers, texts, lists "
                "and mappings of them"
            ) from error
        return state


def _within(seconds: float, name: str, call: Callable[[], Any], where: str) -> Any:
    """What the user's own code returns, if it returns: whatever else it does, say which reward it was."""
    try:
        return within(seconds, call)
    except TimeLimitError as error:
        raise InputError(
            f"reward {name!r} did not return within {seconds:g} s ({where}); mend it, or allow more "
            "(--reward-seconds; 0: any time)"
        ) from error
    except (Exception, SystemExit, KeyboardInterrupt) as error:
        if was_interrupted(error):
            raise
        kind = type(error).__name__
        raise InputError(f"reward {name!r} raised {kind}: {printable(str(error))} ({where})") from error


def _name(function: Reward) -> str:
    return getattr(function, "__name__", type(function).__name__)


def _parse(spec: object) -> tuple[str, float, Reward]:
    if not isinstance(spec, str):
        raise InputError(f"reward {spec!r} is of type {type(spec).__name__}; give a name or a path, such as accuracy")
    weight_text, star, name = spec.rpartition("*")
    try:
        weight = float(weight_text) if star else 1.0
        if not math.isfinite(weight):
            raise ValueError(weight)
    except ValueError as error:
        raise InputError(
            f"reward {spec!r}: the weight {weight_text!r} is not a number that is finite; write e.g. 0.5*{name}"
        ) from error
    if name in REWARDS:
        return name, weight, REWARDS[name]
    if name in ADAPTIVE:
        return name, weight, ADAPTIVE[name]()
    if ":" not in name:
        known = ", ".join([*REWARDS, *ADAPTIVE])
        raise InputError(f"unknown reward {name!r}; use one of {known}, or package.module:function")
    return name, weight, import_dotted(name, f"reward {name!r}", "a function of RewardTerms")
