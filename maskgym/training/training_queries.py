"""What is drawn for the training of a backbone: images with queries about them, without those that fail."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from PIL import Image

from maskgym.backbones.backbone import Backbone
from maskgym.backbones.encodings.encoding import QuerySource
from maskgym.backbones.encodings.left_out import MAX_FAILED, LeftOut
from maskgym.common.errors import InputError


class TrainingQueries:
    """Queries that a backbone can learn from, looked at when they are drawn: with an image that can be read and
    processed, and a question and an answer that it has tokens for, and room.

    Args:
        backbone: learns.
        queries: all of them.
        max_failed: share of the draws that may fail.
        seed: of what is drawn in the place of queries that fail. It depends on them alone, not on when they are met.

    Attributes:
        left_out: those that have failed.
    """

    def __init__(self, backbone: Backbone, queries: QuerySource, max_failed: float = MAX_FAILED, seed: int = 0):
        self.backbone, self.queries, self.seed = backbone, queries, seed
        self.left_out = LeftOut(self._failures, lambda number: queries.text(number)[0], max_failed)
        self._spans: dict[tuple[int, int], int] = {}
        self._image: Image.Image | None = None

    def draw(self, numbers: Sequence[int]) -> tuple[Image.Image, list[int]]:
        """An image, and those of the queries about it that do not fail; where all do, another query with its image.

        Args:
            numbers: of queries that show the same image.

        Raises:
            InputError: more queries fail than may.
        """
        stand_ins = np.random.default_rng((self.seed, numbers[0]))
        drawn = list(numbers)
        while True:
            failed = self._failures(drawn)
            self.left_out.count(drawn, failed)
            if len(failed) < len(drawn):
                assert self._image is not None
                return self._image, [number for number in drawn if number not in failed]
            drawn = [int(stand_ins.integers(len(self.queries)))]

    def answer(self, number: int) -> list[int]:
        """Ids of the answer to learn: the most frequent of the accepted ones.

        Raises:
            InputError: none is accepted, or the tokenizer does not know its words.
        """
        id, _, accepted = self.queries.text(number)
        if not accepted:
            raise InputError(f"query {id!r} has no answers; training needs one")
        answer = max(accepted, key=accepted.count)
        ids = self.backbone.answer_ids(answer)
        if not ids or self.backbone.processor.tokenizer.unk_token_id in ids:
            raise InputError(
                f"query {id!r}: the tokenizer cannot represent the answer {answer!r}; leave the query out, or train "
                "with a tokenizer that has its words"
            )
        return ids

    def _failures(self, numbers: Sequence[int]) -> dict[int, str]:
        """Why some queries that show the same image fail; the image is kept for who asked."""
        failed: dict[int, str] = {}
        self._image = None
        for number in numbers:
            try:
                if self._image is None:
                    self._image = self.queries[number].the_image()
                self._check(number, self._image)
            except InputError as error:
                failed[number] = str(error)
        return failed

    def _check(self, number: int, image: Image.Image) -> None:
        """Refuse a query that the backbone cannot learn from.

        Raises:
            InputError: why.
        """
        id, question, _ = self.queries.text(number)
        if image.size not in self._spans:  # the size alone decides how an image is processed
            self._spans[image.size] = self.backbone.span_of(image, id)
        self.backbone.fitting([question], [self._spans[image.size]], [id], [len(self.answer(number))])
