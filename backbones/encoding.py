"""Queries, and what a backbone makes of them once, before any plan.

Shape legend: B queries, N visual tokens, T text tokens of the longest prompt, D hidden width of the decoder.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from backbones.errors import InputError


@dataclass(frozen=True)
class Query:
    """One image, one question, the accepted answers.

    Attributes:
        id: unique within its source.
        image: an RGB image.
        question: the question's text, without a prompt template.
        answers: the accepted answers; several annotators' answers may repeat. Empty when unknown.
        image_key: equal for queries that show the same image, so that it is encoded once.
    """

    id: str
    image: Image.Image
    question: str
    answers: tuple[str, ...] = ()
    image_key: Hashable = None


@dataclass
class Encoding:
    """A batch of encoded queries.

    Attributes:
        visual_BND: visual tokens after the projector.
        visual_positions_BN: int64 place of each visual token in the unpruned sequence.
        text_BTD: text embeddings of the prompt, padded at the end.
        text_positions_BT: int64 place of each text token in the unpruned sequence.
        text_valid_BT: bool, False where padded.
        ids: the queries' ids.
        answers: the queries' accepted answers.
    """

    visual_BND: Tensor
    visual_positions_BN: Tensor
    text_BTD: Tensor
    text_positions_BT: Tensor
    text_valid_BT: Tensor
    ids: list[str] = field(default_factory=list)
    answers: list[tuple[str, ...]] = field(default_factory=list)

    def __len__(self) -> int:
        return self.visual_BND.shape[0]

    @property
    def text_tokens(self) -> Tensor:
        """(B,) text tokens of each prompt."""
        return self.text_valid_BT.sum(1)

    @property
    def lengths(self) -> Tensor:
        """(B,) length of each unpruned sequence, visual and text tokens."""
        return self.text_tokens + self.visual_BND.shape[1]

    def rows(self, rows: Tensor) -> Encoding:
        """Some rows of the batch, in the given order; rows may repeat."""
        picked = rows.tolist()
        return Encoding(
            self.visual_BND[rows],
            self.visual_positions_BN[rows],
            self.text_BTD[rows],
            self.text_positions_BT[rows],
            self.text_valid_BT[rows],
            [self.ids[row] for row in picked] if self.ids else [],
            [self.answers[row] for row in picked] if self.answers else [],
        )


class QuerySource(Protocol):
    """Queries by number; what ``envs.queries.load_queries`` returns."""

    def __len__(self) -> int: ...

    def __getitem__(self, number: int) -> Query: ...

    def image_key(self, number: int) -> Hashable: ...

    def text(self, number: int) -> tuple[str, str, tuple[str, ...]]:
        """Id, question and answers, without decoding the image."""
        ...


class Encoder(Protocol):
    """The part of a backbone that the bank uses."""

    def encode_images(self, images: Sequence[Image.Image]) -> Tensor: ...

    def assemble(
        self, visual_BND: Tensor, questions: Sequence[str], ids: list[str], answers: list[tuple[str, ...]]
    ) -> Encoding: ...


class EncodingBank:
    """Encodings by query number, each image encoded once and kept while there is room.

    Args:
        encoder: the backbone that encodes.
        source: the queries.
        capacity_bytes: visual tokens are kept up to this size; beyond it the least recently used are dropped
            and encoded anew when asked for.
        batch_size: images per call of the vision tower.
    """

    def __init__(self, encoder: Encoder, source: QuerySource, capacity_bytes: int = 2 * 1024**3, batch_size: int = 256):
        self.encoder = encoder
        self.source = source
        self.capacity_bytes = capacity_bytes
        self.batch_size = batch_size
        self._slots: OrderedDict[Hashable, int] = OrderedDict()
        self._store: Tensor | None = None

    def __len__(self) -> int:
        return len(self.source)

    def gather(self, numbers: Sequence[int] | np.ndarray) -> Encoding:
        """The encodings of some queries, in order; numbers may repeat.

        Raises:
            InputError: a number outside the source, or an image that cannot be read.
        """
        numbers = [int(number) for number in numbers]
        outside = [number for number in numbers if not 0 <= number < len(self.source)]
        if outside:
            raise InputError(f"query number {outside[0]} does not exist; the source has {len(self.source)} queries")
        keys = [self.source.image_key(number) for number in numbers]
        visual_BND = self._visual(dict(zip(keys, numbers, strict=True)), keys)
        ids, questions, answers = zip(*(self.source.text(number) for number in numbers), strict=True)
        return self.encoder.assemble(visual_BND, questions, list(ids), list(answers))

    def _visual(self, number_of_key: dict[Hashable, int], keys: list[Hashable]) -> Tensor:
        missing = [key for key in number_of_key if key not in self._slots]
        fresh: dict[Hashable, Tensor] = {}
        for start in range(0, len(missing), self.batch_size):
            batch = missing[start : start + self.batch_size]
            encoded = self.encoder.encode_images([self.source[number_of_key[key]].image for key in batch])
            fresh.update(zip(batch, encoded, strict=True))
        if not missing:
            assert self._store is not None
            return self._store[self._touch(keys)]
        # Stacked, that is copied, before the store changes under the stored rows.
        visual_BND = torch.stack([fresh[key] if key in fresh else self._stored(key) for key in keys])
        for key, row in fresh.items():
            self._keep(key, row)
        return visual_BND

    def _stored(self, key: Hashable) -> Tensor:
        assert self._store is not None
        return self._store[self._slots[key]]

    def _touch(self, keys: list[Hashable]) -> Tensor:
        for key in keys:
            self._slots.move_to_end(key)
        return torch.tensor([self._slots[key] for key in keys])

    def _keep(self, key: Hashable, row: Tensor) -> None:
        room = max(1, self.capacity_bytes // (row.numel() * row.element_size()))
        if self._store is None:
            self._store = row.new_empty((min(room, 256), *row.shape))
        if len(self._slots) < room:
            slot = len(self._slots)
            if slot == len(self._store):
                larger = row.new_empty((min(room, 2 * slot), *row.shape))
                larger[:slot] = self._store
                self._store = larger
        else:
            _, slot = self._slots.popitem(last=False)
        self._store[slot] = row
        self._slots[key] = slot
