"""Dropping visual tokens inside the decoder: on entering a layer, only the best of those still there go on.

How many go on is part of the plan, so its cost is known before it runs; which ones may be left to scores that are taken
during the prefill.

Shape legend: B rows, N visual tokens, T text tokens, L layers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

EVERYTHING = torch.iinfo(torch.int64).max
"""``keep`` of rows that a stage leaves alone."""

Asking = Literal["last", "marked", "all"]
"""Whose attention is asked for: of the row's last token, of the text tokens that the stage marks, of every token."""


class View(Protocol):
    """What a scorer sees: a prefill on entering a stage's layer (``engine.token_scores``)."""

    @property
    def tokens(self) -> Any:
        """Those still there, packed, with their hidden states."""
        ...

    def attention(self, who: Asking = "last", here: bool = False) -> Tensor:
        """(B, N) attention that visual tokens receive."""
        ...


class StagePrice(Protocol):
    """What the cost of scoring depends on (``plans.plan_cost``)."""

    @property
    def entering_B(self) -> Tensor:
        """Int64, tokens of the sequence that reach the stage."""
        ...

    def attention(self, who: Asking, here: bool) -> Tensor:
        """(B,) int64: FLOPs of ``View.attention`` with the same arguments."""
        ...


class Scorer(Protocol):
    """Scores visual tokens inside the decoder. Two equal scorers are one: make it a frozen dataclass."""

    def score(self, view: View) -> Tensor:
        """(B, N); the highest go on. Tokens that are gone may get any number."""
        ...

    def flops(self, price: StagePrice) -> Tensor:
        """(B,) int64: what scoring costs."""
        ...


@dataclass(frozen=True)
class AttentionScore:
    """The attention that a visual token receives, averaged over heads and over the tokens that ask.

    Attributes:
        who: asks.
        here: of the layer that the stage stands before, whose queries and keys are then computed on the side; if not,
            of the layer before it, whose queries and keys are at hand.
    """

    who: Asking = "last"
    here: bool = False

    def score(self, view: View) -> Tensor:
        return view.attention(self.who, self.here)

    def flops(self, price: StagePrice) -> Tensor:
        return price.attention(self.who, self.here)


@dataclass(frozen=True, eq=False)
class Stage:
    """From ``layer`` on, of the visual tokens still there, only the best go on.

    Attributes:
        layer: entered by the chosen ones only.
        keep: (B,) int64, how many go on; ``EVERYTHING`` leaves a row alone.
        scores: (B, N) if they are known beforehand, else
        scorer: takes them when the layer is reached.
        marked: (B, T) bool, text tokens whose attention an ``AttentionScore("marked")`` asks for.
    """

    layer: int
    keep: Tensor
    scores: Tensor | None = None
    scorer: Scorer | None = None
    marked: Tensor | None = None

    @classmethod
    def given(cls, layer: int, tokens: Tensor) -> Stage:
        """Only ``tokens`` (B, N) go on."""
        return cls(layer, tokens.sum(1), tokens.float())

    def map(self, function: Callable[[Tensor], Tensor]) -> Stage:
        """The stage with a function applied to each tensor."""
        scores, marked = (None if part is None else function(part) for part in (self.scores, self.marked))
        return Stage(self.layer, function(self.keep), scores, self.scorer, marked)


def cat_stages(parts: Sequence[tuple[Stage, ...]], rows: Sequence[int]) -> tuple[Stage, ...]:
    """The stages of a batch put together from parts of ``rows`` rows each.

    Stages at one layer with one scorer become one stage; it leaves the rows of parts without it alone.
    """
    found: dict[tuple[int, Scorer | None, int], dict[int, Stage]] = {}
    for number, stages in enumerate(parts):
        seen: dict[tuple[int, Scorer | None], int] = {}
        for stage in stages:
            kind = (stage.layer, stage.scorer)
            seen[kind] = seen.get(kind, -1) + 1
            found.setdefault((*kind, seen[kind]), {})[number] = stage
    joined = [_join(members, rows) for members in found.values()]
    return tuple(sorted(joined, key=lambda stage: stage.layer))


def _join(members: dict[int, Stage], rows: Sequence[int]) -> Stage:
    """One stage from those of some parts, by part number."""
    like = next(iter(members.values()))
    keeps = [
        members[part].keep if part in members else like.keep.new_full((count,), EVERYTHING)
        for part, count in enumerate(rows)
    ]
    columns = []
    for name in ("scores", "marked"):
        own = {part: getattr(stage, name) for part, stage in members.items() if getattr(stage, name) is not None}
        columns.append(_pad_and_join(own, rows) if own else None)
    return Stage(like.layer, torch.cat(keeps), columns[0], like.scorer, columns[1])


def _pad_and_join(own: dict[int, Tensor], rows: Sequence[int]) -> Tensor:
    width = max(part.shape[1] for part in own.values())
    like = next(iter(own.values()))
    return torch.cat(
        [
            F.pad(own[part], (0, width - own[part].shape[1])) if part in own else like.new_zeros(count, width)
            for part, count in enumerate(rows)
        ]
    )


def token_counts(count_B: Tensor, stages: Sequence[Stage], layers: int) -> Tensor:
    """(B, L) visual tokens in each layer, of (B,) that enter the first."""
    counts_BL = count_B[:, None].repeat(1, layers)
    for stage in stages:
        counts_BL[:, stage.layer :] = counts_BL[:, stage.layer :].minimum(stage.keep[:, None])
    return counts_BL


def best_tokens(scores_BN: Tensor, among_BN: Tensor, keep_B: Tensor) -> Tensor:
    """(B, N) bool: the ``keep_B`` highest among some; of equals the earlier."""
    lowest = torch.finfo(torch.float64).min
    scores_BN = scores_BN.double().nan_to_num(nan=lowest, neginf=lowest).masked_fill(~among_BN, -torch.inf)
    order_BN = scores_BN.argsort(dim=1, descending=True, stable=True)
    places_BN = torch.arange(order_BN.shape[1], device=order_BN.device).expand_as(order_BN)
    rank_BN = torch.empty_like(order_BN).scatter_(1, order_BN, places_BN)
    return among_BN & (rank_BN < keep_B[:, None])
