"""What a backbone says: answers while they are made and when they are done, and what they may cost.

Shape legend: B rows.
"""

from __future__ import annotations

from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field

import torch
from torch import Tensor

from maskgym.backbones.plans.masks import Masks


@dataclass(frozen=True)
class Answers:
    """What the backbone said under a batch of plans.

    Attributes:
        texts: the answers, special tokens removed.
        tokens: the generated ids of each answer, up to and without the end token.
        log_likelihood: (B,) log-probability of each query's reference answer, if references were given.
        masks: the plans as they were executed: decisions inside the decoder are taken.
        generated: how many tokens were generated for each, one that ended it included; None: they were given.
        cut: which answers were cut because their limit had no room for another token; none without a limit.
    """

    texts: list[str]
    tokens: list[list[int]]
    log_likelihood: Tensor | None
    masks: Masks
    generated: list[int] | None = None
    cut: list[bool] = field(default_factory=list)

    @property
    def spent_tokens(self) -> Tensor:
        """(B,) int64: the tokens that each answer's decode is paid for."""
        spent = self.generated if self.generated is not None else [len(ids) for ids in self.tokens]
        return torch.tensor(spent, device=self.masks.tokens.device)


@dataclass(frozen=True)
class Limit:
    """What answers may cost at most, counted token by token.

    Attributes:
        flops_B: (B,) int64 LLM FLOPs.
        controller: FLOPs of the controller that chose each plan, one number or (B,), as in ``Backbone.cost``.
    """

    flops_B: Tensor
    controller: int | Tensor = 0


class Said:
    """Answers while they are made: B lists of ids that grow.

    Args:
        room: tokens that each may have at most, the one that ends it included.
        most: that all may have; an answer that its room cuts below it is cut by its limit.
        ends: ids that end an answer.
    """

    def __init__(self, room: list[int], most: int, ends: AbstractSet[int]):
        self.room, self.most, self.ends = room, most, ends
        self.tokens: list[list[int]] = [[] for _ in room]
        self.generated = [0] * len(room)
        self.open = [True] * len(room)

    @property
    def cut(self) -> list[bool]:
        """Which answers have filled a room that is smaller than what all may have, and not ended."""
        return [len(ids) == room < self.most for ids, room in zip(self.tokens, self.room, strict=True)]

    def add(self, next_ids: list[int]) -> None:
        """One more token for each answer that goes on."""
        for row, token in enumerate(next_ids):
            if self.open[row]:
                self.generated[row] += 1
                if token not in self.ends:
                    self.tokens[row].append(token)
                self.open[row] = token not in self.ends and self.generated[row] < self.room[row]
