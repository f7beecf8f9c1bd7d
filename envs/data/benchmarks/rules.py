"""The official scoring rules by name: of one answer, and of a whole data set."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from maskgym.envs.data.accepted import Accepted
from maskgym.envs.data.benchmarks import metrics, parsing, vqa
from maskgym.envs.data.benchmarks.metrics import Answered, Metrics


@dataclass(frozen=True)
class Rule:
    """How a benchmark scores.

    Attributes:
        score: of one answer against the accepted ones, in [0, 1].
        metrics: of the whole data set.
        max_new_tokens: answers are cut there; VLMs end short ones by themselves.
    """

    score: Callable[[str, Accepted], float]
    metrics: Callable[[Answered], Metrics]
    max_new_tokens: int = 16


def _exact(answer: str, accepted: Accepted) -> float:
    return float(parsing.exact(answer) in map(parsing.exact, accepted))


def _pope(answer: str, accepted: Accepted) -> float:
    return float(parsing.pope_says(answer) == accepted[0].lower())


def _mme(answer: str, accepted: Accepted) -> float:
    return float(parsing.mme_says(answer) == accepted[0].lower())


def _scienceqa(answer: str, accepted: Accepted) -> float:
    return float(parsing.scienceqa_says(answer) == accepted[0])


def _mmbench(answer: str, accepted: Accepted) -> float:
    return float(parsing.mmbench_says(answer, accepted.choices) == accepted[0])


_ACCURACY = metrics.by_kind(metrics.accuracy)

RULES = {
    "vqav2": Rule(vqa.vqav2_score, _ACCURACY),
    "textvqa": Rule(vqa.textvqa_score, _ACCURACY),
    "vizwiz": Rule(vqa.vizwiz_score, metrics.vizwiz),
    "gqa": Rule(_exact, _ACCURACY),
    "clevr": Rule(_exact, _ACCURACY),
    "nlvr2": Rule(_exact, metrics.nlvr2),
    "pope": Rule(_pope, metrics.pope),
    "mme": Rule(_mme, metrics.mme),
    "scienceqa": Rule(_scienceqa, _ACCURACY),
    "mmbench": Rule(_mmbench, metrics.by_kind(metrics.circular)),
}
