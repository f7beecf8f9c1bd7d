"""What a text says, piece by piece."""

from __future__ import annotations

from itertools import pairwise


def words_and_pairs(text: str) -> list[str]:
    """The words of a question or answer, lower-cased, and its pairs of neighbouring words."""
    words = text.lower().rstrip("?").split()
    return [*words, *(" ".join(pair) for pair in pairwise(words))]
