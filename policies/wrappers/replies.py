"""Answers to single queries, each with its plan and what it took: for use, where records are for comparisons.

Shape legend: B rows.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from maskgym.backbones.answers import Answers, Limit
from maskgym.backbones.backbone import Backbone
from maskgym.backbones.encodings.encoding import Encoding, Query
from maskgym.backbones.latency_model import LatencyModel
from maskgym.backbones.plans.masks import Masks
from maskgym.policies.planner import Planner, adopted
from maskgym.policies.planning.projection import budget_flops
from maskgym.policies.wrappers.milliseconds import MillisecondPlanner


@dataclass(frozen=True)
class Reply:
    """An answer and what it took.

    Attributes:
        text: the answer.
        plan: what was kept: 1 row.
        budget: share, in (0, 1], of the full plan's LLM FLOPs that the plan was given.
        llm_flops_ratio: share that the plan costs, controller included, at the answer length that plans are priced at.
        llm_flops: the same in FLOPs.
        total_flops: with vision tower and projector.
        spent_llm_flops: LLM FLOPs of this answer with all its tokens, the one that ends it included.
        kept_tokens: visual tokens, the mean over layers.
        kept_heads: head slots in layers that were run.
        kept_layers: layers that were run.
        predicted_ms: milliseconds of the prefill, by a latency model; None without one.
        cut: whether the budget was hard, and had no room for the answer's next token.
    """

    text: str
    plan: Masks
    budget: float
    llm_flops_ratio: float
    llm_flops: int
    total_flops: int
    spent_llm_flops: int
    kept_tokens: float
    kept_heads: int
    kept_layers: int
    predicted_ms: float | None = None
    cut: bool = False

    def figures(self) -> dict[str, Any]:
        """All but text and plan, by name."""
        return {name: value for name, value in vars(self).items() if name not in ("text", "plan")}


@dataclass(frozen=True)
class Planned:
    """Queries with their plans, ready to be answered.

    Attributes:
        planner: has chosen them; its FLOPs are charged.
        backbone: answers.
        encoding: B queries.
        masks: B plans.
        budgets_B: shares that they were given.
        latency_model: predicts their prefill, if asked to.
    """

    planner: Planner
    backbone: Backbone
    encoding: Encoding
    masks: Masks
    budgets_B: Tensor
    latency_model: LatencyModel | None = None

    @classmethod
    def of(
        cls,
        planner: Planner,
        backbone: Backbone,
        queries: Sequence[Query],
        budgets: Sequence[float],
        latency_model: LatencyModel | None = None,
    ) -> Planned:
        """Encode B queries and plan each within its own budget.

        Raises:
            InputError: a query that fails, or a budget below the cost of the smallest plan.
        """
        return cls.of_encoding(planner, backbone, backbone.encode(queries), budgets, latency_model)

    @classmethod
    def of_encoding(
        cls,
        planner: Planner,
        backbone: Backbone,
        encoding: Encoding,
        budgets: Sequence[float],
        latency_model: LatencyModel | None = None,
    ) -> Planned:
        """Plan B encoded queries each within its own budget.

        Raises:
            InputError: a budget below the cost of the smallest plan.
        """
        budgets_B = torch.tensor(budgets, dtype=torch.float64, device=backbone.device)
        if isinstance(planner, MillisecondPlanner):
            masks, budgets_B = planner.choose(encoding, budgets_B)
        else:
            masks = planner.plan(encoding, budgets_B)
        return cls(adopted(planner), backbone, encoding, masks, budgets_B, latency_model)

    def limit(self) -> Limit:
        """What answers may cost where budgets are hard."""
        flops_B = budget_flops(self.budgets_B, self.backbone.full_llm_flops(self.encoding))
        return Limit(flops_B, self.planner.controller_flops(self.encoding))

    def answer(self, max_new_tokens: int, hard: bool = False) -> list[Reply]:
        """The B replies, if budgets are hard cut where these have no room for another token."""
        limit = self.limit() if hard else None
        return self.replies(self.backbone.answer(self.encoding, self.masks, max_new_tokens, limit=limit))

    def replies(self, answers: Answers) -> list[Reply]:
        """What answers to the B queries, under these plans, took."""
        backbone, encoding, masks = self.backbone, self.encoding, answers.masks
        controller = self.planner.controller_flops(encoding)
        cost = backbone.cost(encoding, masks, controller)
        columns: dict[str, Tensor] = {
            "budget": self.budgets_B,
            "llm_flops_ratio": cost.llm / backbone.full_llm_flops(encoding),
            "llm_flops": cost.llm,
            "total_flops": cost.total,
            "spent_llm_flops": backbone.cost(encoding, masks, controller, answers.spent_tokens).llm,
            "kept_tokens": backbone.visual_counts(masks).double().mean(1),
            "kept_heads": masks.effective_heads.sum((1, 2)),
            "kept_layers": masks.layers.sum(1),
        }
        if self.latency_model is not None:
            columns["predicted_ms"] = self.latency_model.predict(backbone, encoding, masks)
        cuts = answers.cut or [False] * len(answers.texts)
        rows = zip(*(column.tolist() for column in columns.values()), strict=True)
        return [
            Reply(text, masks[row : row + 1].to("cpu"), cut=cut, **dict(zip(columns, figures, strict=True)))
            for row, (text, cut, figures) in enumerate(zip(answers.texts, cuts, rows, strict=True))
        ]


class Stream:
    """The pieces of an answer as they come; together they are the reply's text.

    Args:
        planned: one query.
        max_new_tokens: the answer is cut there.
        hard: whether it is also cut where the budget has no room for another token.

    Attributes:
        reply: None until the answer has ended.
    """

    def __init__(self, planned: Planned, max_new_tokens: int, hard: bool = False):
        self.reply: Reply | None = None
        self._pieces = self._say(planned, max_new_tokens, planned.limit() if hard else None)

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        return next(self._pieces)

    def _say(self, planned: Planned, max_new_tokens: int, limit: Limit | None) -> Iterator[str]:
        said = ""
        for answers in planned.backbone.stream(planned.encoding, planned.masks, max_new_tokens, limit):
            sure = answers.texts[0].rstrip("\ufffd")  # what a character begun by this token may still replace
            if sure.startswith(said) and sure != said:
                yield sure[len(said) :]
                said = sure
        (self.reply,) = planned.replies(answers)
        if self.reply.text != said:
            yield self.reply.text[len(said) :]
