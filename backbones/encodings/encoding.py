"""Queries, and what a backbone makes of them once, before any plan.

Shape legend: B queries, N visual tokens of the longest image, n of one image, T text tokens of the longest prompt,
D hidden width of the decoder, R rotary position components (1, or 3 for M-RoPE).
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field, fields, replace
from functools import lru_cache
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from maskgym.backbones.encodings.images import upright_rgb
from maskgym.backbones.encodings.saliency import Saliency
from maskgym.common.errors import InputError

LOOKED_UP = 65536
"""Queries whose texts and image keys a bank remembers, and questions and answers whose ids a backbone does: the last
that were asked for."""


@dataclass(frozen=True)
class Query:
    """One image, one question, the accepted answers.

    Attributes:
        id: unique within its source.
        image: of any of Pillow's modes.
        question: the question's text, without a prompt template.
        answers: the accepted answers; several annotators' answers may repeat. Empty when unknown.
        image_key: equal for queries that show the same image, so that it is encoded once.
    """

    id: str
    image: Image.Image
    question: str
    answers: tuple[str, ...] = ()
    image_key: Hashable = None

    def the_image(self) -> Image.Image:
        """The image, if it is one, in RGB whatever it came in.

        Raises:
            InputError: no image, several, something else, or one that cannot be decoded; the message names the query.
        """
        image: Any = self.image
        if isinstance(image, Image.Image):
            return upright_rgb(image, f"the image of query {self.id!r}")
        if image is None:
            raise no_image(self.id)
        if isinstance(image, list | tuple):
            raise InputError(f"query {self.id!r} has {len(image)} images in a list; one a query is supported, as it is")
        raise InputError(f"the image of query {self.id!r} is of type {type(image).__name__}; it must be a PIL image")


def no_image(id: str) -> InputError:
    """What to say of a query without an image."""
    return InputError(f"query {id!r} has no image; every query needs one: add it, or remove the query")


@dataclass(frozen=True)
class EncodedImage:
    """What the vision side made of one image, before any question.

    Attributes:
        visual_nD: visual tokens after the projector.
        span: length of the stretch of the prompt that stands for the image.
        visual_offsets: (n,) where in the span the visual tokens stand.
        text_ids: ids of the text tokens within the span (tile markers, say), and
        text_offsets: where they stand.
        grid: (time, height, width) in patches, for families whose rotary positions need it.
        vision_flops: of the vision tower on this image.
        projector_flops: of the projector on this image.
        saliency: by signal, what the vision tower was asked.
    """

    visual_nD: Tensor
    span: int
    visual_offsets: Tensor
    text_ids: tuple[int, ...] = ()
    text_offsets: tuple[int, ...] = ()
    grid: tuple[int, ...] | None = None
    vision_flops: int = 0
    projector_flops: int = 0
    saliency: Mapping[str, Saliency] = field(default_factory=dict)

    @property
    def nbytes(self) -> int:
        own = self.visual_nD.numel() * self.visual_nD.element_size()
        return own + sum(part.nbytes for part in self.saliency.values())


@dataclass
class Encoding:
    """A batch of encoded queries, padded at the end of each row.

    Attributes:
        visual_BND: visual tokens after the projector.
        visual_valid_BN: bool, False where padded.
        visual_places_BN: int64 place of each visual token in the unpruned sequence.
        visual_rope_BNR: its rotary position.
        text_BTD: text embeddings of the prompt.
        text_valid_BT: bool, False where padded.
        text_places_BT: int64 place of each text token in the unpruned sequence.
        text_rope_BTR: its rotary position.
        next_rope_B: rotary position of the first answer token.
        vision_flops_B: FLOPs of the vision tower.
        projector_flops_B: FLOPs of the projector.
        expected_tokens: answer length at which plans for these queries are priced, the token that ends it included: one
            number for all, or (B,) int64. By their questions; their own answers have no part in it.
        ids: the queries' ids.
        answers: the queries' accepted answers.
        saliency: by signal, what the vision tower was asked of all images.
    """

    visual_BND: Tensor
    visual_valid_BN: Tensor
    visual_places_BN: Tensor
    visual_rope_BNR: Tensor
    text_BTD: Tensor
    text_valid_BT: Tensor
    text_places_BT: Tensor
    text_rope_BTR: Tensor
    next_rope_B: Tensor
    vision_flops_B: Tensor
    projector_flops_B: Tensor
    expected_tokens: int | Tensor = 1
    ids: list[str] = field(default_factory=list)
    answers: list[tuple[str, ...]] = field(default_factory=list)
    saliency: dict[str, Saliency] = field(default_factory=dict)

    def __len__(self) -> int:
        return self.visual_BND.shape[0]

    @property
    def text_tokens(self) -> Tensor:
        """(B,) text tokens of each prompt."""
        return self.text_valid_BT.sum(1)

    def rows(self, rows: Tensor) -> Encoding:
        """Some rows of the batch, in the given order; rows may repeat."""
        picked = rows.tolist()

        def pick(value: Any) -> Any:
            if isinstance(value, int):
                return value
            if isinstance(value, dict):
                return {signal: part.rows(rows) for signal, part in value.items()}
            return value[rows] if isinstance(value, Tensor) else [value[row] for row in picked] if value else []

        return replace(self, **{entry.name: pick(getattr(self, entry.name)) for entry in fields(self)})


class QuerySource(Protocol):
    """Queries by number; what ``maskgym.envs.data.queries.load_queries`` returns."""

    def __len__(self) -> int: ...

    def __getitem__(self, number: int) -> Query: ...

    def image_key(self, number: int) -> Hashable: ...

    def text(self, number: int) -> tuple[str, str, tuple[str, ...]]:
        """Id, question and answers, without decoding the image."""
        ...


class Encoder(Protocol):
    """The part of a backbone that the bank uses."""

    @property
    def signals(self) -> AbstractSet[str]:
        """What the vision tower is asked of every image."""
        ...

    def encode_images(self, images: Sequence[Image.Image], ids: Sequence[str]) -> list[EncodedImage]: ...

    def fitting(self, questions: Sequence[str], spans: Sequence[int], ids: Sequence[str], room: Sequence[int]) -> Any:
        """Refuses prompts that cannot be assembled, with some places of room behind them."""
        ...

    def assemble(
        self,
        images: Sequence[EncodedImage],
        questions: Sequence[str],
        ids: list[str],
        answers: list[tuple[str, ...]],
        continuations: Sequence[list[int]] | None = None,
    ) -> Encoding: ...


class EncodingBank:
    """Encodings by query number, each image encoded once and kept while there is room.

    Args:
        encoder: the backbone that encodes.
        source: the queries.
        capacity_bytes: visual tokens are kept up to this size; beyond it the least recently used are dropped
            and encoded anew when asked for.
        batch_size: images per call of the vision tower. By default one: in larger batches an image's last bits depend
            on which others happened to be missing with it, and a resumed run would no longer equal an unbroken one.

    Attributes:
        failed: by number, why queries that were asked of ``gather_valid`` or ``failures`` fail. They are not tried
            again, so that all who share the bank leave out the same queries.
    """

    def __init__(self, encoder: Encoder, source: QuerySource, capacity_bytes: int = 2 * 1024**3, batch_size: int = 1):
        self.encoder = encoder
        self.source = source
        self.capacity_bytes = capacity_bytes
        self.batch_size = batch_size
        self.failed: dict[int, str] = {}
        self._text, self._image_key = lru_cache(LOOKED_UP)(source.text), lru_cache(LOOKED_UP)(source.image_key)
        self._kept: OrderedDict[Hashable, EncodedImage] = OrderedDict()
        self._bytes = 0

    def __len__(self) -> int:
        return len(self.source)

    def ids(self, numbers: Sequence[int] | np.ndarray) -> list[str]:
        """The ids of some queries."""
        return [self._text(int(number))[0] for number in numbers]

    def gather(self, numbers: Sequence[int] | np.ndarray, continuations: Sequence[list[int]] | None = None) -> Encoding:
        """The encodings of some queries, in order; numbers may repeat.

        Args:
            numbers: of the queries in the source.
            continuations: ids that follow each prompt, for teacher forcing.

        Raises:
            InputError: a number outside the source, or a query that fails (an image that is missing or cannot be read,
                a question that does not fit the context, say); the message names the query.
        """
        numbers = self._within(numbers)
        place = {number: row for row, number in enumerate(dict.fromkeys(numbers))}
        if continuations is not None or 2 * len(place) > len(numbers):  # picking rows is a copy, too
            return self._gather(numbers, continuations)
        return self._gather(list(place)).rows(torch.tensor([place[number] for number in numbers]))

    def _gather(self, numbers: list[int], continuations: Sequence[list[int]] | None = None) -> Encoding:
        keys = [self._image_key(number) for number in numbers]
        images = self._images(dict(zip(keys, numbers, strict=True)))
        ids, questions, answers = zip(*(self._text(number) for number in numbers), strict=True)
        shown = [images[key] for key in keys]
        return self.encoder.assemble(shown, questions, list(ids), list(answers), continuations)

    def gather_valid(self, numbers: Sequence[int] | np.ndarray) -> tuple[Encoding | None, list[int], dict[int, str]]:
        """As ``gather``, without the queries that fail.

        Returns:
            The encoding of the others, None if there are none; their numbers; and why each of the rest failed.

        Raises:
            InputError: a number outside the source.
        """
        numbers = self._within(numbers)
        try:
            encoding = self._gather_untried(numbers)
        except InputError:  # one by one they show which it was; encoded images are kept, so little is done twice
            for number in dict.fromkeys(numbers):
                self._try(number)
            encoding = self._gather_untried(numbers)
        failed = {number: self.failed[number] for number in numbers if number in self.failed}
        return encoding, [number for number in numbers if number not in failed], failed

    def failures(
        self, numbers: Sequence[int] | np.ndarray, room: Callable[[int], int] = lambda number: 0
    ) -> dict[int, str]:
        """Why some of the queries fail. Images are encoded, and kept, prompts looked at and not put together.

        Args:
            numbers: of the queries.
            room: places that a query needs behind its prompt; may raise ``InputError``, for a query that fails.

        Raises:
            InputError: a number outside the source.
        """
        numbers = self._within(numbers)
        untried = [number for number in dict.fromkeys(numbers) if number not in self.failed]
        try:
            self._look_at(untried, room)
        except InputError:
            for number in untried:
                self._try(number, room)
        return {number: self.failed[number] for number in numbers if number in self.failed}

    def _look_at(self, numbers: list[int], room: Callable[[int], int]) -> None:
        if not numbers:
            return
        keys = [self._image_key(number) for number in numbers]
        images = self._images(dict(zip(keys, numbers, strict=True)))
        ids, questions, _ = zip(*(self._text(number) for number in numbers), strict=True)
        self.encoder.fitting(questions, [images[key].span for key in keys], ids, [room(number) for number in numbers])

    def _gather_untried(self, numbers: list[int]) -> Encoding | None:
        """All but those known to fail."""
        left = [number for number in numbers if number not in self.failed]
        return self.gather(left) if left else None

    def _try(self, number: int, room: Callable[[int], int] = lambda number: 0) -> None:
        if number not in self.failed:
            try:
                self.gather([number], [[0] * room(number)])
            except InputError as error:
                self.failed[number] = str(error)

    def _within(self, numbers: Sequence[int] | np.ndarray) -> list[int]:
        checked = [int(number) for number in numbers]
        for number in checked:
            if not 0 <= number < len(self.source):
                raise InputError(f"query number {number} does not exist; the source has {len(self.source)} queries")
        return checked

    def _images(self, number_of_key: dict[Hashable, int]) -> dict[Hashable, EncodedImage]:
        asked = self.encoder.signals
        found = {key: self._kept[key] for key in number_of_key if key in self._kept and asked <= self._asked(key)}
        for key in found:
            self._kept.move_to_end(key)
        missing = [key for key in number_of_key if key not in found]
        for start in range(0, len(missing), self.batch_size):
            batch = missing[start : start + self.batch_size]
            queries = [self.source[number_of_key[key]] for key in batch]
            encoded = self.encoder.encode_images(
                [query.the_image() for query in queries], [query.id for query in queries]
            )
            for key, image in zip(batch, encoded, strict=True):
                found[key] = image
                self._keep(key, image)
        return found

    def _asked(self, key: Hashable) -> AbstractSet[str]:
        return self._kept[key].saliency.keys()

    def _keep(self, key: Hashable, image: EncodedImage) -> None:
        if key in self._kept:
            self._bytes -= self._kept.pop(key).nbytes
        self._kept[key] = image
        self._bytes += image.nbytes
        while self._bytes > self.capacity_bytes and len(self._kept) > 1:
            self._bytes -= self._kept.popitem(last=False)[1].nbytes
