"""Where answers are cut: behind the longest accepted answer of the data, in the backbone's tokens.

Shape legend: R rows of a data set's split, queries all of them.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol
from weakref import WeakKeyDictionary

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from maskgym.backbones.encodings.encoding import QuerySource

MOST = 32
"""Tokens at which an answer is cut at the latest, where nothing else is asked for."""


class Tokenizes(Protocol):
    """The part of a backbone that is asked here."""

    def answer_lengths(self, answers: Sequence[str]) -> list[int]: ...


class AcceptedLengths:
    """How many tokens the accepted answers of a split have, counted once for each backbone; answers that repeat are
    tokenized once.

    Args:
        answers: (R,) Arrow lists of texts, at least one each.
        rules: (R,) Arrow texts: by which rule a row is scored; where there is one, it decides what is right, and the
            row's answers count as of no length.
    """

    def __init__(self, answers: Any, rules: Any | None = None):
        self._answers, self._rules = answers, rules
        self._counted: WeakKeyDictionary[Tokenizes, tuple[int, np.ndarray]] = WeakKeyDictionary()

    def __reduce__(self) -> tuple[Any, ...]:
        """What was counted stays behind: it is of backbones in this process."""
        return type(self), (self._answers, self._rules)

    @classmethod
    def of(cls, source: QuerySource) -> AcceptedLengths:
        """Those of a source: its own, or counted anew from its texts."""
        own = getattr(source, "accepted_lengths", None)
        if own is not None:
            return own
        accepted = [list(source.text(number)[2]) or [""] for number in range(len(source))]
        return cls(pa.chunked_array([pa.array(accepted, pa.list_(pa.string()))]))

    def longest(self, backbone: Tokenizes) -> int:
        """Tokens of the longest accepted answer."""
        return self._count(backbone)[0]

    def shortest(self, backbone: Tokenizes) -> np.ndarray:
        """(R,) tokens of each row's shortest accepted answer."""
        return self._count(backbone)[1]

    def _count(self, backbone: Tokenizes) -> tuple[int, np.ndarray]:
        if backbone not in self._counted:
            self._counted[backbone] = self._counted_by(backbone)
        return self._counted[backbone]

    def _counted_by(self, backbone: Tokenizes) -> tuple[int, np.ndarray]:
        free_R = np.ones(len(self._answers), bool) if self._rules is None else pc.is_null(self._rules).to_numpy()
        shortest_R = np.zeros(len(free_R), np.int64)
        if not free_R.any():
            return 0, shortest_R
        texts = pc.list_flatten(self._answers).cast(pa.large_string())  # views cannot be counted with
        starts_R = np.cumsum([0, *pc.list_value_length(self._answers).to_numpy()[:-1]])
        different = pc.unique(texts)
        lengths = np.array(backbone.answer_lengths([str(text) for text in different.to_pylist()]))
        lengths = lengths[pc.index_in(texts, value_set=different).to_numpy()]
        shortest_R[free_R] = np.minimum.reduceat(lengths, starts_R)[free_R]
        return int(np.maximum.reduceat(lengths, starts_R)[free_R].max()), shortest_R


@dataclass(frozen=True)
class Cut:
    """Where the answers to a source's queries are cut.

    Attributes:
        tokens: there.
        why: so.
        out_of_reach: queries without an accepted answer of at most so many tokens.
        queries: in all.
    """

    tokens: int
    why: str
    out_of_reach: int
    queries: int

    def __str__(self) -> str:
        said = f"answers are cut at {_tokens(self.tokens)} ({self.why})"
        if not self.out_of_reach:
            return said
        one = self.out_of_reach == 1
        return (
            f"{said}; {self.out_of_reach:,} of {self.queries:,} queries {'has' if one else 'have'} no accepted answer "
            f"of at most {_tokens(self.tokens)}, so {'it counts' if one else 'they count'} as wrong"
        )


def cut_of(backbone: Tokenizes, source: QuerySource, given: int | None = None) -> Cut:
    """Where answers are cut.

    By default one token behind the longest accepted answer of the source's split, at ``MOST`` tokens at the latest: a
    longer answer that begins like the right one is then seen to be another. Where all accepted answers have one token,
    the first token is the answer, and nothing is decoded. A scoring rule has its own cut.

    Args:
        backbone: whose tokens are counted.
        source: the queries, a whole split or part of one: a part has its split's cut.
        given: cut there instead.
    """
    accepted = AcceptedLengths.of(source)
    tokens, why = (given, "as asked for") if given is not None else _by_default(backbone, source, accepted)
    within_R = accepted.shortest(backbone) <= tokens
    within = within_R[list(getattr(source, "rows", range(len(source))))]
    return Cut(tokens, why, int((~within).sum()), len(source))


def answer_cut(backbone: Tokenizes, source: QuerySource, given: int | None = None) -> int:
    """The tokens of ``cut_of``."""
    return _by_default(backbone, source, AcceptedLengths.of(source))[0] if given is None else given


def _by_default(backbone: Tokenizes, source: QuerySource, accepted: AcceptedLengths) -> tuple[int, str]:
    called = " ".join(str(getattr(source, part, "")) for part in ("name", "split")).strip() or "the data"
    by_rule, longest = int(getattr(source, "max_new_tokens", 1)), max(1, accepted.longest(backbone))
    own = 1 if longest == 1 else min(longest + 1, MOST)
    if by_rule > own:
        return by_rule, f"as the scoring of {called} has it"
    has = f"the longest accepted answer of {called}"
    if longest == 1:
        return own, has
    return own, f"{has} has {longest}" + (", and one more shows whether it ends there" if own > longest else "")


def _tokens(count: int) -> str:
    return f"{count} token{'' if count == 1 else 's'}"


def say_cuts(backbone: Tokenizes, sources: Sequence[QuerySource], given: int | None = None) -> None:
    """A line on standard error for where the answers to some queries are cut; sources alike share one. Nothing where
    answers are their first token, and can all be right so."""
    said = {1}
    for source in sources:
        cut = cut_of(backbone, source, given)
        if cut.out_of_reach or cut.tokens not in said:
            print(cut, file=sys.stderr)
        said.add(cut.tokens)
