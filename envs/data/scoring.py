"""Scores of an answer against the accepted ones, in [0, 1]."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence

from maskgym.common.errors import InputError
from maskgym.envs.data.accepted import Accepted
from maskgym.envs.data.benchmarks.rules import RULES


def normalise(answer: str) -> str:
    """Lower case, single spaces, no full stop at the end."""
    return " ".join(answer.lower().split()).rstrip(".").rstrip()


def exact_match(answer: str, accepted: Sequence[str]) -> float:
    """1 if the answer equals an accepted one after normalisation, else 0."""
    return float(normalise(answer) in {normalise(other) for other in accepted})


def token_f1(answer: str, accepted: Sequence[str]) -> float:
    """Harmonic mean of precision and recall of the answer's words, in whatever order, against the accepted answer that
    it meets best (Rajpurkar et al. 2016, arXiv 1606.05250; articles count here)."""
    said = _words(answer)
    found = [2 * (said & own).total() / (said.total() + own.total()) for own in map(_words, accepted)]
    return max(found, default=0.0)


def _words(answer: str) -> Counter[str]:
    """How often each word is in an answer; one that is all punctuation is one word."""
    return Counter(re.findall(r"\w+", normalise(answer)) or [normalise(answer)])


def vqa_accuracy(answer: str, accepted: Sequence[str]) -> float:
    """VQA soft accuracy (Antol et al. 2015, arXiv 1505.00468): the mean, over leaving one annotator out, of
    min(matches among the others / 3, 1)."""
    counts = Counter(map(normalise, accepted))
    matches, others = counts[normalise(answer)], len(accepted) - 1
    if others < 1:
        return exact_match(answer, accepted)
    without_match = (len(accepted) - matches) * min(matches / 3, 1)
    without_other = matches * min((matches - 1) / 3, 1)
    return (without_match + without_other) / len(accepted)


def score(answer: str, accepted: Sequence[str]) -> float:
    """By the rule of a benchmark's accepted answers; of others exact match for a single one, VQA soft accuracy for
    several annotators'."""
    if isinstance(accepted, Accepted):
        return RULES[accepted.rule].score(answer, accepted)
    return exact_match(answer, accepted) if len(accepted) < 2 else vqa_accuracy(answer, accepted)


def reference(accepted: Sequence[str]) -> str:
    """The answer whose likelihood is measured: the most frequent accepted one, the first among equals.

    Raises:
        InputError: none.
    """
    if not accepted:
        raise InputError("a query has no accepted answers, and one is needed; give every query one, or leave it out")
    return Counter(accepted).most_common(1)[0][0]
