"""``--model maskgym``: a trained controller as a model of lmms-eval."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from lmms_eval.api.instance import GenerationResult, Instance, TokenCounts
from lmms_eval.api.model import lmms
from lmms_eval.models.model_utils.gen_metrics import log_metrics

from maskgym.eval.measure.evaluate import Record
from maskgym.lmms.arguments import Arguments
from maskgym.lmms.requests import Request
from maskgym.lmms.throughput import AVERAGED, throughput


@dataclass
class Spent(TokenCounts):
    """What lmms-eval logs beside a sample's answer, as its ``token_counts``: here all that the answer took.

    Attributes:
        figures: by name.
    """

    figures: dict[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        return {**super().to_dict(), **self.figures}


class Scored(tuple, GenerationResult):
    """A loss, and whether decoding gives the continuation: the pair that ``loglikelihood`` is to give.

    It is a result, too, because the evaluator of lmms-eval 0.7 makes a string of a mere pair, and its multiple-choice
    tasks then fail.

    Args:
        pair: the two.
        token_counts: what scoring took.
    """

    text: tuple[float, bool]

    def __new__(cls, pair: tuple[float, bool], token_counts: Spent) -> Scored:
        return super().__new__(cls, pair)

    def __init__(self, pair: tuple[float, bool], token_counts: Spent):
        self.text, self.token_counts = pair, token_counts


class MaskGym(lmms):
    """Answers the harness's requests under one budget or several; the harness is given the answers under the first.

    A simple model in lmms-eval's terms: it is given contexts and pictures, and puts its own chat template around them.

    Args:
        **options: those of ``Arguments``, as ``--model_args`` gives them.

    Raises:
        InputError: options without sense, or nothing to be loaded with them.
    """

    is_simple = True

    def __init__(self, **options: Any):
        super().__init__()
        self._rank, self._world_size = (int(os.environ.get(*one)) for one in (("RANK", "0"), ("WORLD_SIZE", "1")))
        arguments = Arguments.read(options)
        self.answerer = arguments.open(self._rank, self._world_size, int(os.environ.get("LOCAL_RANK", "0")))
        self.device = self.answerer.device

    def generate_until(self, requests: Sequence[Instance]) -> list[GenerationResult]:
        """Answers of generation requests.

        Raises:
            InputError: a request that the VLM cannot take, options that are not greedy, or a budget below the cost of
                the smallest plan.
        """
        records = self._records([Request.to_generate(request, self.task_dict) for request in requests])
        return [GenerationResult(own["answer"], _spent(own)) for own, *_ in records]

    def loglikelihood(self, requests: Sequence[Instance]) -> list[Scored]:
        """Of each continuation the mean negative log-likelihood of its tokens, and whether decoding gives it.

        lmms-eval's own models give this loss, and its multiple-choice tasks take the choice of the lowest.

        Raises:
            InputError: a request that the VLM cannot take.
        """
        records = self._records([Request.to_score(request, self.task_dict) for request in requests])
        return [Scored((_loss(own), own["greedy"]), _spent(own)) for own, *_ in records]

    def generate_until_multi_round(self, requests: Sequence[Instance]) -> list[str]:
        """Not there: a query is one image and one question."""
        raise NotImplementedError(
            "maskgym answers one question about one image; tasks of several rounds are not supported: leave them out"
        )

    def _records(self, requests: list[Request]) -> list[list[Record]]:
        """Those of each request by budget; their means go into the harness's results."""
        records = self.answerer.records(requests, progress=self.rank == 0)
        counted = [own for request, own in zip(requests, records, strict=True) if not request.padding]
        if counted:
            log_metrics(**throughput(counted))
        return records


def _loss(record: Record) -> float:
    return -record["log_likelihood"] / max(1, record["new_tokens"])


def _spent(record: Record) -> Spent:
    figures = {name: record[name] for name in ("budget", *AVERAGED, "batch")}
    return Spent(output_tokens=record["new_tokens"], figures=figures)
