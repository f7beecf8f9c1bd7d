"""Scores of a whole data set, part by part, from the scores of its queries.

Shape legend: Q queries that were answered.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from envs.benchmarks.parsing import exact, pope_says

Metrics = dict[str, dict[str, float]]
"""By part of the data set, and by metric."""

ALL = "all"


@dataclass(frozen=True)
class Answered:
    """Queries, and what was answered, each (Q,).

    Attributes:
        texts: the answers.
        accepted: the accepted answers.
        scores: each answer's score, in [0, 1].
        kinds: part of the data set: a kind of question, a subtask, a split.
        groups: equal for queries that count together: those of one image, one question in several orders, one sentence.
    """

    texts: Sequence[str]
    accepted: Sequence[Sequence[str]]
    scores: np.ndarray
    kinds: Sequence[str]
    groups: Sequence[str]

    def only(self, rows: Sequence[int]) -> Answered:
        """Some of the queries."""
        lists = ([column[row] for row in rows] for column in (self.texts, self.accepted, self.kinds, self.groups))
        texts, accepted, kinds, groups = lists
        return Answered(texts, accepted, self.scores[list(rows)], kinds, groups)  # type: ignore[arg-type]

    def parts(self) -> Iterator[tuple[str, Answered]]:
        """The queries of each kind that has a name, in the order of first use."""
        rows: dict[str, list[int]] = {}
        for row, kind in enumerate(self.kinds):
            if kind:
                rows.setdefault(kind, []).append(row)
        for kind, own in rows.items():
            yield kind, self.only(own)

    def whole_groups(self) -> np.ndarray:
        """(groups,) 1 where every query of a group is right, else 0."""
        right: dict[str, bool] = {}
        for group, score in zip(self.groups, self.scores, strict=True):
            right[group] = right.get(group, True) and score == 1
        return np.array(list(right.values()), float)


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
        true = np.array([accepted[0].lower() == "yes" for accepted in part.accepted])
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
        right, both = float(part.scores.mean()), float(part.whole_groups().mean())
        parts[kind] = {"accuracy": right, "accuracy+": both, "score": 100 * (right + both)}
    for total, subtasks in MME_SUBTASKS.items():
        own = [parts[subtask]["score"] for subtask in subtasks if subtask in parts]
        if own:
            parts[total] = {"score": sum(own)}
    return parts


def circular(answered: Answered) -> dict[str, float]:
    """Accuracy over all orders of the options, and over questions that are right in every order (CircularEval of
    MMBench, arXiv 2307.06281) where the table has several orders."""
    right = answered.whole_groups()
    several = len(right) < len(answered.scores)
    return {**accuracy(answered), **({"circular": float(right.mean())} if several else {})}


def nlvr2(answered: Answered) -> Metrics:
    """Accuracy, and consistency: the share of sentences that are judged right with every pair of photographs
    (``metrics.py`` of NLVR2, arXiv 1811.00491)."""
    return {ALL: {**accuracy(answered), "consistency": float(answered.whole_groups().mean())}}


def vizwiz(answered: Answered) -> Metrics:
    """Accuracy by type of answer, and how well unanswerable questions are told: by the answer ``unanswerable``, for no
    confidence is asked of the VLM, where the official task ranks by one."""
    said = np.array([exact(text) == "unanswerable" for text in answered.texts])
    true = np.array([group == "unanswerable" for group in answered.groups])
    return {**by_kind(accuracy)(answered), "telling unanswerable": detection(said, true)}
