"""What answers' lengths are expected to be, from a training split: its questions' words and its answers, nothing else.

Shape legend: Q queries, W words.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence

import numpy as np

from maskgym.backbones.expected_length import DEEPEST, Expected, words_of
from maskgym.common.errors import InputError
from maskgym.envs.data.answer_length import Tokenizes, answer_cut
from maskgym.envs.data.queries import DatasetQueries
from maskgym.envs.data.scoring import reference

FITTED = 20_000
"""Queries that are looked at, at most, spread over the split."""

MOST_WORDS = 500
"""Words that may divide queries: the most frequent ones."""

FEWEST = 50
"""Queries behind every number of a tree, at least."""

WORTH = 1e-3
"""Share of the lengths' squared deviations that a division must explain, at least."""


def mean_length(backbone: Tokenizes, train: DatasetQueries, max_new_tokens: int | None = None) -> int:
    """Tokens of a mean answer, rounded up.

    Args:
        backbone: whose tokens are counted.
        train: the training split, whole.
        max_new_tokens: where answers are cut, if not as ``maskgym.envs.data.answer_length.answer_cut`` has it.

    Raises:
        InputError: no query has an answer.
    """
    _, lengths_Q = _observed(backbone, train, max_new_tokens)
    return _rounded_up(lengths_Q)


def predicted_length(backbone: Tokenizes, train: DatasetQueries, max_new_tokens: int | None = None) -> Expected:
    """A regression tree over words: queries are divided by whether the question has a word, the one that explains most
    of the lengths' squared deviations first, and each part has its mean length, rounded up. Always the same for the
    same data; a number where no word explains anything.

    Args:
        backbone: whose tokens are counted.
        train: the training split, whole.
        max_new_tokens: where answers are cut, if not as ``maskgym.envs.data.answer_length.answer_cut`` has it.

    Raises:
        InputError: no query has an answer.
    """
    questions, lengths_Q = _observed(backbone, train, max_new_tokens)
    asked = [words_of(question) for question in questions]
    counts = Counter(word for words in asked for word in words)
    frequent = sorted(word for word, count in counts.items() if count >= FEWEST)
    vocabulary = sorted(sorted(frequent, key=lambda word: -counts[word])[:MOST_WORDS])
    has_QW = np.array([[word in words for word in vocabulary] for words in asked], np.float64).reshape(len(asked), -1)
    worth = WORTH * float(np.square(lengths_Q - lengths_Q.mean()).sum())
    return _grown(has_QW, lengths_Q, vocabulary, worth, DEEPEST)


def _observed(backbone: Tokenizes, train: DatasetQueries, max_new_tokens: int | None) -> tuple[list[str], np.ndarray]:
    """Questions, and (Q,) tokens with which their most frequent answers would be said: one more for the end, unless
    they are cut before."""
    some = train.spread(FITTED)
    rows = [(question, reference(accepted)) for _, question, accepted in map(some.text, range(len(some))) if accepted]
    if not rows:
        raise InputError(
            f"the {train.split} split of {train.name} has no answers to expect any length from; give a number of tokens"
        )
    different = list(dict.fromkeys(answer for _, answer in rows))
    length = dict(zip(different, backbone.answer_lengths(different), strict=True))
    lengths_Q = np.array([length[answer] + 1 for _, answer in rows], np.float64)
    return [question for question, _ in rows], lengths_Q.clip(1, answer_cut(backbone, train, max_new_tokens))


def _grown(
    has_QW: np.ndarray, lengths_Q: np.ndarray, vocabulary: Sequence[str], worth: float, deepest: int
) -> Expected:
    """The tree for some queries, of at most ``deepest`` words on top of each other."""
    with_W, total, count = has_QW.sum(0), lengths_Q.sum(), len(lengths_Q)
    without_W, sums_W = count - with_W, lengths_Q @ has_QW
    divides_W = np.minimum(with_W, without_W) >= FEWEST
    explained_W = np.full(len(vocabulary), -np.inf)
    parts = (sums_W[divides_W], with_W[divides_W]), (total - sums_W[divides_W], without_W[divides_W])
    explained_W[divides_W] = sum(sums**2 / counts for sums, counts in parts) - total**2 / count
    best = int(explained_W.argmax()) if vocabulary else 0
    if not vocabulary or not deepest or explained_W[best] <= worth:
        return _rounded_up(lengths_Q)
    has_Q = has_QW[:, best] > 0
    parts_Q = (has_Q, ~has_Q)
    yes, no = (_grown(has_QW[part_Q], lengths_Q[part_Q], vocabulary, worth, deepest - 1) for part_Q in parts_Q)
    return yes if yes == no else {"word": vocabulary[best], "with": yes, "without": no}


def _rounded_up(lengths_Q: np.ndarray) -> int:
    return math.ceil(lengths_Q.mean())
