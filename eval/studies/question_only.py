"""What a question says by itself: the accuracy of a model that never sees the image.

Shape legend: B questions, F words and pairs of words.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from maskgym.common.wording import words_and_pairs
from maskgym.envs.data.queries import DatasetQueries, load_queries
from maskgym.envs.data.scoring import reference, score
from maskgym.eval import cli
from maskgym.eval.studies import elasticity


@dataclass
class QuestionOnly:
    """How often answers can be guessed from the question: the accuracy, by kind of question, of a classifier that is
    trained on the data's training split and never sees an image.

    Example: python -m maskgym.eval question-only --data scenes-long
    """

    data: str = "scenes"
    """Queries: a name, or a path with the columns image, question, answers."""
    split: str = "test"
    """train, validation or test; what is asked."""
    limit: int | None = None
    """Use so many queries of the split, spread over it."""
    seed: int = 0
    """Of the classifier's weights and batches."""
    json: Path | None = None
    """Also write the figures there."""

    def run(self) -> None:
        cli.check_output("--json", self.json)
        train, asked = load_queries(self.data, "train"), load_queries(self.data, self.split).spread(self.limit)
        kinds = elasticity.by_kind(question_only_accuracy(train, asked, seed=self.seed), asked)
        cli.write_json(self.json, [{"data": self.data, "split": self.split, "seed": self.seed, "kinds": kinds}])
        print(elasticity.kinds_table(kinds))


def question_only_accuracy(train: DatasetQueries, test: DatasetQueries, steps: int = 600, seed: int = 0) -> np.ndarray:
    """(test queries,) scores of a classifier of bags of words and word pairs, with one hidden layer.

    Args:
        train: what it learns from.
        test: what it is asked.
        steps: of Adam, on 512 questions each.
        seed: of its weights and batches.
    """
    torch.manual_seed(seed)
    texts = [train.text(number) for number in range(len(train))]
    answers = {answer: place for place, answer in enumerate(sorted({reference(accepted) for _, _, accepted in texts}))}
    features = _Features([question for _, question, _ in texts])
    targets = torch.tensor([answers[reference(accepted)] for _, _, accepted in texts])
    model = _Classifier(len(features.numbers) + 1, len(answers))
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    rng = np.random.default_rng(seed)
    for _ in tqdm(range(steps), desc="questions alone", unit="step"):
        picked = rng.integers(len(texts), size=512)
        loss = F.cross_entropy(model([features.bags[row] for row in picked]), targets[picked])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    asked = [test.text(number) for number in range(len(test))]
    with torch.no_grad():
        best = model([features.bag(question) for _, question, _ in asked]).argmax(1)
    names = list(answers)
    return np.array([score(names[place], accepted) for place, (_, _, accepted) in zip(best, asked, strict=True)])


class _Classifier(nn.Module):
    def __init__(self, features: int, answers: int, width: int = 128):
        super().__init__()
        self.embed = nn.EmbeddingBag(features, width, mode="sum")
        self.head = nn.Sequential(nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, answers))

    def forward(self, bags: list[list[int]]) -> Tensor:
        starts = np.cumsum([0, *(len(bag) for bag in bags[:-1])])
        return self.head(self.embed(torch.tensor([number for bag in bags for number in bag]), torch.tensor(starts)))


class _Features:
    """Numbers of the words and word pairs of training questions; 0 for those never seen."""

    def __init__(self, questions: list[str]):
        seen = sorted({item for question in set(questions) for item in words_and_pairs(question)})
        self.numbers = {item: number + 1 for number, item in enumerate(seen)}
        self.bags = [self.bag(question) for question in questions]

    def bag(self, question: str) -> list[int]:
        return [self.numbers.get(item, 0) for item in words_and_pairs(question)] or [0]
