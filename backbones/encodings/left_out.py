"""Queries that a training draws and cannot use, a file that is missing, say: others are drawn in their place.

They are named and counted; only where more of them fail than may, the training ends.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from tqdm import tqdm

from maskgym.backbones.encodings.encoding import EncodingBank
from maskgym.common.errors import InputError, queries_named

MAX_FAILED = 0.05
"""Share of the drawn queries that may fail, where nothing else is said."""

FEW = 20
"""Draws that may fail whatever share they are: of few draws a share says little."""

MOST_NAMED = 100
"""Queries that are named on standard error; further ones are counted."""


class LeftOut:
    """Which of the queries that were drawn fail, and how many may.

    Args:
        failures: why some of the queries of these numbers fail; the others do not.
        id_of: the id of a query.
        max_failed: share, in [0, 1), of the draws that may fail; beyond ``FEW`` of them, unless it is 0.

    Attributes:
        drawn: queries drawn so far, with repetitions.
        missed: those of them that failed.

    Raises:
        InputError: a share outside [0, 1).
    """

    def __init__(
        self,
        failures: Callable[[Sequence[int]], Mapping[int, str]],
        id_of: Callable[[int], str],
        max_failed: float = MAX_FAILED,
    ):
        check_max_failed("max_failed", max_failed)
        self._failures, self._id_of, self.max_failed = failures, id_of, max_failed
        self.drawn, self.missed = 0, 0
        self._numbers: dict[int, None] = {}  # an ordered set
        self._named: set[int] = set()
        self._unnamed: dict[int, str] = {}

    @classmethod
    def of(cls, bank: EncodingBank, room: Callable[[int], int], max_failed: float = MAX_FAILED) -> LeftOut:
        """Of those that a bank holds.

        Args:
            bank: see its ``failures``.
            room: likewise.
            max_failed: share of the draws that may fail.
        """
        return cls(lambda numbers: bank.failures(numbers, room), lambda number: bank.ids([number])[0], max_failed)

    @property
    def numbers(self) -> list[int]:
        """Of the queries that failed, each once, as they were met."""
        return list(self._numbers)

    def draw(self, count: int, draw: Callable[[np.ndarray], Any]) -> np.ndarray:
        """(count,) numbers of queries that do not fail: in place of those that do others are drawn, until none does.

        Args:
            count: of queries.
            draw: gives the numbers for some places of the result.

        Raises:
            InputError: more fail than may.
        """
        numbers = np.zeros(count, np.int64)
        places = np.arange(count)
        while len(places):
            numbers[places] = draw(places)
            drawn = numbers[places].tolist()
            failed = self._failures(drawn)
            self.count(drawn, failed)
            places = places[[number in failed for number in drawn]]
        return numbers

    def count(self, drawn: Sequence[int], failed: Mapping[int, str]) -> None:
        """Take note of numbers that were drawn, and why some of them fail; these are named when first met.

        Raises:
            InputError: more fail than may.
        """
        self.drawn += len(drawn)
        self.missed += sum(number in failed for number in drawn)
        self._numbers |= dict.fromkeys(failed)
        self._unnamed |= {number: reason for number, reason in failed.items() if number not in self._named}
        if self.missed < self.drawn:  # of data where nothing works the error says enough
            self._name()
        if self.missed > (max(FEW, self.max_failed * self.drawn) if self.max_failed else 0):
            raise InputError(
                f"{self.missed:,} of {self.drawn:,} queries drawn so far failed, more than the share --max-failed "
                f"{self.max_failed:g} allows ({self._who()}); mend them, leave them out, or allow more; the last: "
                f"{next(iter(failed.values()))}"
            )

    def _name(self) -> None:
        for number, reason in self._unnamed.items():
            if len(self._named) < MOST_NAMED:
                tqdm.write(failure_line(self._id_of(number), reason), file=sys.stderr)
            self._named.add(number)
        self._unnamed = {}

    def _who(self) -> str:
        return queries_named([self._id_of(number) for number in self.numbers[:4]])

    def metrics(self) -> dict[str, int]:
        """For a line of metrics: how many queries were left out, if any were."""
        return {"left_out": len(self._numbers)} if self._numbers else {}

    def say(self) -> None:
        """A line on standard error, if any were left out."""
        if self._numbers:
            count = len(self._numbers)
            what = "1 query was" if count == 1 else f"{count:,} queries were"
            print(f"{what} left out of the training, failing: {self._who()}", file=sys.stderr)

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps; JSON data."""
        return {"drawn": self.drawn, "missed": self.missed, "numbers": self.numbers}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Go on counting from there. Which queries fail is found anew, so what was mended meanwhile is used."""
        self.drawn, self.missed = state["drawn"], state["missed"]
        self._numbers = dict.fromkeys(state["numbers"])


def failure_line(id: str, reason: str) -> str:
    """What is said of a query that fails."""
    return f"query {id!r} failed: {' '.join(reason.split())}"


def check_max_failed(option: str, share: float) -> None:
    """Refuse what is no share of queries that may fail.

    Raises:
        InputError: naming the option and its value.
    """
    if not 0 <= share < 1:
        raise InputError(f"{option} is {share:g}; it must be a share of the queries, at least 0 and below 1")
