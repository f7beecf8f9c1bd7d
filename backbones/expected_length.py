"""How many tokens the answer to a question is expected to have, the one that ends it included.

What is expected is a number, or a tree of questions' words as plain dicts, so that files can hold it:
``{"word": "describe", "with": 11, "without": 1}`` expects 11 tokens where the question has the word, else 1.

Shape legend: B questions.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from numbers import Integral
from typing import Any, TypeAlias

import torch
from torch import Tensor

from maskgym.common.errors import InputError, check_count

Expected: TypeAlias = int | Mapping[str, Any]
"""A number of tokens, or a tree of such."""

BRANCHES = ("with", "without")
LONGEST = 100_000
"""Tokens that an answer may be expected to have, at most: FLOPs are counted in 64 bits."""
DEEPEST = 64
"""Words on the way from a tree's root to its furthest number, at most."""


def words_of(question: str) -> set[str]:
    """The different words of a question, in lower case."""
    return set(re.findall(r"\w+", question.lower()))


def check_expected(expected: object) -> Expected:
    """What is expected, as plain Python, if it can be priced.

    Raises:
        InputError: neither a number of at least 1 nor a tree of words and such numbers.
    """
    return _checked(expected, DEEPEST)


def _checked(expected: object, deepest: int) -> Expected:
    if isinstance(expected, Integral) or not isinstance(expected, Mapping):
        check_count("expected_answer_tokens", expected)
        assert isinstance(expected, Integral)
        tokens = int(expected)
        if tokens > LONGEST:
            raise InputError(f"expected_answer_tokens is {tokens}; it must be at most {LONGEST}")
        return tokens
    if set(expected) != {"word", *BRANCHES} or not isinstance(expected["word"], str) or not deepest:
        raise InputError(
            f"expected_answer_tokens is {dict(expected)!r:.80}; give a number of tokens, or a tree of at most "
            f"{DEEPEST} words on top of each other, with the keys word, with and without"
        )
    return {"word": expected["word"], **{branch: _checked(expected[branch], deepest - 1) for branch in BRANCHES}}


def numbers_of(expected: Expected) -> Iterator[int]:
    """All numbers of tokens that may be expected."""
    if isinstance(expected, int):
        yield expected
    else:
        for branch in BRANCHES:
            yield from numbers_of(expected[branch])


def described(expected: Expected) -> str:
    """What is expected, in words."""
    fewest, most = min(numbers_of(expected)), max(numbers_of(expected))
    return f"{fewest} to {most} tokens" if fewest < most else f"{most} token{'s' * (most > 1)}"


def expected_tokens(expected: Expected, questions: Sequence[str], device: torch.device) -> int | Tensor:
    """Tokens that the answers to some questions are expected to have: one number for all, or (B,) int64."""
    if isinstance(expected, int):
        return expected
    return torch.tensor([_of(expected, words_of(question)) for question in questions], device=device)


def _of(expected: Expected, words: set[str]) -> int:
    while not isinstance(expected, int):
        expected = expected["with" if expected["word"] in words else "without"]
    return expected
