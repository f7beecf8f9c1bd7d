"""Requests answered under each of several budgets, with what each answer took.

Shape legend: B requests of a batch.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, TypeVar

from tqdm import tqdm

from maskgym.backbones.answers import Answers
from maskgym.backbones.backbone import Backbone
from maskgym.backbones.encodings.encoding import Encoding
from maskgym.eval.measure.evaluate import Record, check_budgets
from maskgym.eval.measure.latency import timed
from maskgym.lmms.requests import SCORE, Request
from maskgym.policies.planner import Planner
from maskgym.policies.wrappers.replies import Planned, Reply

T = TypeVar("T")


class Answering:
    """Answers each request under all its budgets; its image is encoded once.

    A record says what was asked (``Request.asked``), the ``answer`` and its ``new_tokens``, for scoring the
    continuation's ``log_likelihood`` and whether it is what greedy decoding says (``greedy``), the figures of its
    ``Reply``, the budget among them, and times: ``encode_ms`` and ``answer_ms`` are wall-clock milliseconds of the
    whole batch of ``batch`` requests, the second of planning and answering under this budget.

    Args:
        planner: chooses the plans.
        backbone: answers.
        budgets: shares, in (0, 1], of the full plan's LLM FLOPs.
        batch_size: requests a call; those of a batch have the same longest answer.
        write: takes the records of each batch, without padding.

    Raises:
        InputError: no budget, or one outside (0, 1].
    """

    def __init__(
        self,
        planner: Planner,
        backbone: Backbone,
        budgets: Sequence[float],
        batch_size: int = 1,
        write: Callable[[Sequence[Record]], None] | None = None,
    ):
        self.planner, self.backbone, self.device = planner, backbone, backbone.device
        self.budgets, self.batch_size, self.write = check_budgets(budgets), batch_size, write

    def records(self, requests: Sequence[Request], progress: bool = False) -> list[list[Record]]:
        """Those of each request, in the order asked, by budget.

        Raises:
            InputError: a request that the VLM cannot take, or a budget below the cost of the smallest plan.
        """
        found: list[list[Record]] = [[] for _ in requests]
        with tqdm(total=len(requests), desc=self.planner.name, unit="request", disable=not progress) as bar:
            for rows in _batches(requests, self.batch_size):
                batch = [requests[row] for row in rows]
                for row, own in zip(rows, self._answer(batch), strict=True):
                    found[row] = own
                if self.write is not None:
                    self.write([record for row in rows if not requests[row].padding for record in found[row]])
                bar.update(len(rows))
        return found

    def _answer(self, requests: Sequence[Request]) -> list[list[Record]]:
        queries = [request.query() for request in requests]
        encoding, encode_ms = self._clocked(lambda: self.backbone.encode(queries))
        by_budget = []
        for budget in self.budgets:
            (replies, said), answer_ms = self._clocked(partial(self._say, requests, encoding, budget))
            times = {"encode_ms": encode_ms, "answer_ms": answer_ms, "batch": len(requests)}
            by_budget.append(
                [
                    {**request.asked(), **own, **_figures(reply), **times}
                    for request, reply, own in zip(requests, replies, said, strict=True)
                ]
            )
        return [list(own) for own in zip(*by_budget, strict=True)]

    def _say(
        self, requests: Sequence[Request], encoding: Encoding, budget: float
    ) -> tuple[list[Reply], list[dict[str, Any]]]:
        """Replies under one budget, and what records have of the answers themselves."""
        planned = Planned.of_encoding(self.planner, self.backbone, encoding, [budget] * len(requests))
        if requests[0].kind == SCORE:
            return self._score(requests, planned)
        longest = requests[0].max_new_tokens
        answers = self.backbone.answer(encoding, planned.masks, longest)
        said = [
            {"answer": request.cut(text), "new_tokens": len(ids)}
            for request, text, ids in zip(requests, answers.texts, answers.tokens, strict=True)
        ]
        return planned.replies(answers), said

    def _score(self, requests: Sequence[Request], planned: Planned) -> tuple[list[Reply], list[dict[str, Any]]]:
        """The continuations' log-likelihoods; FLOPs are those of reading them."""
        texts = [request.continuation.strip() for request in requests]  # the prompt's end stands for their delimiter
        ids = [self.backbone.answer_ids(text) for text in texts]
        longest = max(1, *map(len, ids))
        greedy = self.backbone.answer(planned.encoding, planned.masks, longest, texts)
        assert greedy.log_likelihood is not None
        said = [
            {"answer": text, "new_tokens": len(own), "log_likelihood": likelihood, "greedy": first[: len(own)] == own}
            for text, own, likelihood, first in zip(
                texts, ids, greedy.log_likelihood.tolist(), greedy.tokens, strict=True
            )
        ]
        return planned.replies(Answers(texts, ids, None, greedy.masks)), said

    def _clocked(self, work: Callable[[], T]) -> tuple[T, float]:
        """What it gives, and how many milliseconds it took."""
        given: list[T] = []
        seconds = timed(lambda: given.append(work()), self.device)
        return given[0], 1000 * seconds


def _batches(requests: Sequence[Request], size: int) -> Iterator[list[int]]:
    """Rows of requests to answer together."""
    alike: dict[int, list[int]] = defaultdict(list)
    for row, request in enumerate(requests):
        alike[request.max_new_tokens].append(row)
    for rows in alike.values():
        for start in range(0, len(rows), size):
            yield rows[start : start + size]


def _figures(reply: Reply) -> dict[str, Any]:
    return {name: value for name, value in reply.figures().items() if value is not None}
