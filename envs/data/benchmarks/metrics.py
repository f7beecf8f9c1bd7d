"""Scores of a whole data set, part by part, from the scores of its queries.

Shape legend: Q queries that were answered.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from maskgym.envs.data.benchmarks.parsing import exact, pope_says

Metrics = dict[str, dict[str, float]]
"""By part of the data set, and by metric."""

ALL = "all"


@dataclass(frozen=True)
class Answered:
    """Queries, and what was answered, each (Q,).

    Attributes:
        texts: the answers.
        scores: each answer's score, in [0, 1].
        kinds: part of the data set: a kind of question, a subtask, a split.
        groups: equal for queries that count together: those of one image, one question in several orders, one sentence.
        sizes: by group, how many queries it has in the whole data set, answered or not.
    """

    texts: Sequence[str]
    scores: np.ndarray
    kinds: Sequence[str]
    groups: Sequence[str]
    sizes: Mapping[str, int]

    def only(self, rows: Sequence[int]) -> Answered:
        """Some of the queries."""
        texts, kinds, groups = ([column[row] for row in rows] for column in (self.texts, self.kinds, self.groups))
        return Answered(texts, self.scores[list(rows)], kinds, groups, self.sizes)

    def parts(self) -> Iterator[tuple[str, Answered]]:
        """The queries of each kind that has a name, in the order of first use."""
        rows: dict[str, list[int]] = {}
        for row, kind in enumerate(self.kinds):
            if kind:
                rows.setdefault(kind, []).append(row)
        for kind, own in rows.items():
            yield kind, self.only(own)

    def whole_groups(self) -> np.ndarray:
        """(groups,) 1 where every query of a group is right, else 0; groups of which not all was answered are left
        out."""
        of_group: dict[str, list[float]] = {}
        for group, score in zip(self.groups, self.scores, strict=True):
            of_group.setdefault(group, []).append(score)
        whole = (scores for group, scores in of_group.items() if len(scores) == self.sizes[group])
        return np.array([min(scores) == 1 for scores in whole], float)


def accuracy(answered: Answered) -> dict[str, float]:
    return {"accuracy": float(answered.scores.mean())}


def by_kind(measure: Callable[[Answered], dict[str, float]]) -> Callable[[Answered], Metrics]:
    """The measure of each kind, and of all queries together."""

    def measured(answered: Answered) -> Metrics:
        return {**{kind: measure(part) for kind, part in answered.parts()}, ALL: measure(answered)}

    return measured


def detection(said: np.ndarray, true: np.ndarray) -> dict[str, float]:
    """Precision, recall and F1 of a yes; 0 where one is not defined.

    Args:
        said: (Q,) bool, where yes was said.
        true: (Q,) bool, where yes is right.
    """
    hits = float((said & true).sum())
    precision = hits / said.sum() if said.any() else 0.0
    recall = hits / true.sum() if true.any() else 0.0
    f1 = 2 * precision * recall / (precision + recall) if hits else 0.0
    return {"precision": float(precision), "recall": float(recall), "F1": float(f1)}


def pope(answered: Answered) -> Metrics:
    """Accuracy, precision, recall, F1 and the share of yes, of each split and as the mean of the splits
    (``evaluate.py`` of POPE, arXiv 2305.10355)."""
    parts: Metrics = {}
    for kind, part in answered.parts():
        said = np.array([pope_says(text) == "yes" for text in part.texts])
        true = said == (part.scores == 1)
        parts[kind] = {**accuracy(part), **detection(said, true), "yes ratio": float(said.mean())}
    names = next(iter(parts.values()))
    return {**parts, "mean": {name: float(np.mean([part[name] for part in parts.values()])) for name in names}}


_PERCEPTION = "existence count position color posters celebrity scene landmark artwork OCR"
MME_SUBTASKS = {
    "perception": _PERCEPTION.split(),
    "cognition": ["commonsense_reasoning", "numerical_calculation", "text_translation", "code_reasoning"],
}


def mme(answered: Answered) -> Metrics:
    """Accuracy over questions, accuracy+ over images with both questions right, and 100 times their sum, of each
    subtask; the sums over perception and cognition (``calculation.py`` of MME, arXiv 2306.13394)."""
    parts: Metrics = {}
    for kind, part in answered.parts():
        parts[kind], both = accuracy(part), part.whole_groups()
        if len(both):
            plus = float(both.mean())
            parts[kind] |= {"accuracy+": plus, "score": 100 * (parts[kind]["accuracy"] + plus)}
    for total, subtasks in MME_SUBTASKS.items():
        own = [parts[subtask] for subtask in subtasks if subtask in parts]
        if own and all("score" in part for part in own):
            parts[total] = {"score": sum(part["score"] for part in own)}
    return parts


def circular(answered: Answered) -> dict[str, float]:
    """Accuracy over all orders of the options, and over questions that are right in every order (CircularEval of
    MMBench, arXiv 2307.06281) where the table has several orders."""
    right = answered.whole_groups()
    several = 0 < len(right) < len(answered.scores)
    return {**accuracy(answered), **({"circular": float(right.mean())} if several else {})}


def nlvr2(answered: Answered) -> Metrics:
    """Accuracy, and consistency: the share of sentences that are judged right with every pair of photographs
    (``metrics.py`` of NLVR2, arXiv 1811.00491)."""
    right = answered.whole_groups()
    return {ALL: {**accuracy(answered), **({"consistency": float(right.mean())} if len(right) else {})}}


def vizwiz(answered: Answered) -> Metrics:
    """Accuracy by type of answer, and how well unanswerable questions are told: by the answer ``unanswerable``, for no
    confidence is asked of the VLM, where the official task ranks by one."""
    said = np.array([exact(text) == "unanswerable" for text in answered.texts])
    true = np.array([group == "unanswerable" for group in answered.groups])
    return {**by_kind(accuracy)(answered), "telling unanswerable": detection(said, true)}
