"""Batches for training on a GPU, drawn without end by worker processes: scenes, and questions that share their image.

Shape legend: B images, N visual tokens, S places behind the prefix, T answer tokens of all questions.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer
from torch.utils.data import IterableDataset, get_worker_info

from maskgym.envs.data import scenes_long
from maskgym.training.grow.lessons import WORDS

USER, TURN, END = "<|im_start|>user\n", "<|im_end|>\n<|im_start|>assistant\n", "<|im_end|>"
PADDING = -2
QUESTIONS = 10
"""An image, as far as there is room."""

RADII = scenes_long.LAYOUT.radii


class Pieces:
    """A tokenizer's ids of the pieces that prompts consist of.

    Args:
        tokenizer: the file of the published one.
    """

    def __init__(self, tokenizer: str):
        self._tokenizer = Tokenizer.from_file(tokenizer)
        self._known: dict[str, list[int]] = {}
        self.before, self.turn, (self.end,) = self(USER), self(TURN), self(END)

    def __call__(self, text: str) -> list[int]:
        if text not in self._known:
            if len(self._known) > 200_000:
                self._known.clear()
            self._known[text] = self._tokenizer.encode(text, add_special_tokens=False).ids
        return self._known[text]


@dataclass(frozen=True)
class Batch:
    """Images with questions, as tensors.

    Attributes:
        pixels: (B, 128, 128, 3) uint8.
        ids: (B, S) of questions and answers, one after another.
        owner: (B, S) number of the question, ``PADDING`` at the end.
        places: (B, S) rotary positions, counted from the end of the prefix.
        answers: (B, S) bool: tokens of an answer.
        asked: (B, S) bool: places whose next token is to be told.
        targets: (T,) those tokens.
        question: (T,) number of the question in the batch.
        long: (questions,) bool: whether its answer has several words.
        lessons: (B, N, 6) float32: of the object that covers most of each patch, colour, shape, size (-1: none) and
            where its centre is from the patch's, in patches; and how much of the patch it covers. Empty where there
            is room for questions: those are other batches.
    """

    pixels: torch.Tensor
    ids: torch.Tensor
    owner: torch.Tensor
    places: torch.Tensor
    answers: torch.Tensor
    asked: torch.Tensor
    targets: torch.Tensor
    question: torch.Tensor
    long: torch.Tensor
    lessons: torch.Tensor

    def to(self, device: Any) -> Batch:
        return Batch(**{name: part.to(device, non_blocking=True) for name, part in vars(self).items()})

    def pin_memory(self) -> Batch:
        return Batch(**{name: part.pin_memory() for name, part in vars(self).items()})


class Stream(IterableDataset[Batch]):
    """Batches without end.

    Args:
        tokenizer: the file of the published one.
        images: B.
        room: S; questions are laid out while there is room. Without any, there are no questions, for lessons.
        seed: of what a worker draws, with the worker's number.
        reuse: how many batches show an image, with other questions each time.
    """

    def __init__(self, tokenizer: str, images: int, room: int, seed: int, reuse: int = 3):
        self.tokenizer, self.images, self.room, self.seed, self.reuse = tokenizer, images, room, seed, reuse

    def __iter__(self) -> Iterator[Batch]:
        worker = get_worker_info()
        number = 0 if worker is None else worker.id
        torch.set_num_threads(1)
        rng = np.random.default_rng((self.seed, number, 0, 1))  # no image of a split: those have three numbers
        pieces, asked = Pieces(self.tokenizer), Counter[str]()
        shown: list[Any] = []
        while True:
            if not shown:
                drawn = [scenes_long.scene(rng) for _ in range(self.images * 4)]
                shown = [place for _ in range(self.reuse) for place in rng.permutation(len(drawn)).tolist()]
            picked = [drawn[shown.pop()] for _ in range(self.images)]
            rows = [
                (image, objects, scenes_long.ask(objects, asked, rng, QUESTIONS) if self.room else [])
                for objects, image in picked
            ]
            for _, _, questions in rows:
                rng.shuffle(questions)
            yield collate(rows, pieces, self.room)


def collate(rows: list[tuple[Any, Any, list[Any]]], pieces: Pieces, room: int) -> Batch:
    """A batch of images (Pillow's), their objects, and questions about each, as many as there is room for."""
    shape = (len(rows), room)
    ids, owner = np.zeros(shape, np.int64), np.full(shape, PADDING, np.int64)
    places, answers, asked = np.zeros(shape, np.int64), np.zeros(shape, bool), np.zeros(shape, bool)
    targets: list[int] = []
    question: list[int] = []
    long: list[bool] = []
    for row, (_, _, questions) in enumerate(rows):
        at = 0
        for number, each in enumerate(questions):
            prompt, answer = [*pieces(each.text), *pieces.turn], pieces(each.answer)
            stop = at + len(prompt) + len(answer)
            if stop > room:
                continue
            start = at + len(prompt)
            ids[row, at:stop] = [*prompt, *answer]
            owner[row, at:stop] = number
            places[row, at:stop] = np.arange(stop - at)
            answers[row, start:stop] = True
            asked[row, start - 1 : stop] = True
            targets += [*answer, pieces.end]
            question += [len(long)] * (len(answer) + 1)
            long.append(" " in each.answer)
            at = stop
    return Batch(
        pixels=torch.from_numpy(np.stack([np.asarray(image) for image, _, _ in rows])),
        ids=torch.from_numpy(ids),
        owner=torch.from_numpy(owner),
        places=torch.from_numpy(places),
        answers=torch.from_numpy(answers),
        asked=torch.from_numpy(asked),
        targets=torch.tensor(targets, dtype=torch.long),
        question=torch.tensor(question, dtype=torch.long),
        long=torch.tensor(long, dtype=torch.bool),
        lessons=torch.from_numpy(np.array([lesson(objects) for _, objects, _ in rows if not room], np.float32)),
    )


GRID, FINE = 8, 6


def lesson(objects: Any) -> np.ndarray:
    """(N, 6) what each patch shows; see ``Batch``."""
    at = (np.arange(GRID * FINE) + 0.5) / (GRID * FINE)
    covered = np.stack([_covers(o, at[None, :], at[:, None]) for o in objects])
    share = covered.reshape(-1, GRID, FINE, GRID, FINE).mean((2, 4)).reshape(len(objects), -1)
    most = share.argmax(0)
    told = np.array([[*map(tuple.index, WORDS, (o.color, o.shape, o.size)), GRID * o.x, GRID * o.y] for o in objects])[
        most
    ]
    middle = np.stack(np.meshgrid(np.arange(GRID), np.arange(GRID)), -1).reshape(-1, 2) + 0.5
    told[:, 3:] -= middle
    much = share.max(0)
    told[much < 0.08, :3] = -1
    return np.concatenate([told, much[:, None]], 1).astype(np.float32)


def _covers(o: Any, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Which points an object covers."""
    radius = RADII[o.size]
    across, down = np.abs(x - o.x), y - o.y
    if o.shape == "circle":
        return across**2 + down**2 <= radius**2
    if o.shape == "square":
        return np.maximum(across, np.abs(down)) <= 0.9 * radius
    return (np.abs(down) <= radius) & (across <= (down + radius) / 2)
