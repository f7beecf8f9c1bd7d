"""Accepted answers that know by which rule they are compared."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any


class Accepted(tuple[str, ...]):
    """The accepted answers of a query of a benchmark.

    Attributes:
        rule: name of the scoring rule, in ``maskgym.envs.data.benchmarks.rules.RULES``.
        choices: texts of the options, where the query offers some.
    """

    rule: str
    choices: tuple[str, ...]

    def __new__(cls, answers: Iterable[str], rule: str, choices: Iterable[str] = ()) -> Accepted:
        self = super().__new__(cls, answers)
        self.rule, self.choices = rule, tuple(choices)
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (tuple(self), self.rule, self.choices)
