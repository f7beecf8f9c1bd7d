"""Queries as encodings: the processor, the vision tower, and prompts put together with rotary positions.

Shape legend: B rows, N visual tokens, n of one image, S sequence places, T text tokens, X some places, D hidden width,
R rotary position components.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import replace
from functools import cached_property, lru_cache
from threading import RLock
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from jinja2 import TemplateError
from PIL import Image
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from maskgym.backbones.encodings.encoding import LOOKED_UP, EncodedImage, Encoding, Query
from maskgym.backbones.encodings.saliency import SIGNALS, stack
from maskgym.backbones.expected_length import Expected, expected_tokens
from maskgym.backbones.families.family import Family
from maskgym.backbones.plans.masks import MaskLayout
from maskgym.common.errors import InputError, query_named


class QueryEncoder:
    """What a model's processor, vision tower and embeddings make of queries, before any plan.

    Several threads may use it at once; processor and vision tower then serve them one by one.

    Args:
        family: the model and what is particular to its kind.
        layout: of the plans; encodings are padded to its visual tokens.

    Attributes:
        signals: what the vision tower is asked of every image.
        expected_answer_tokens: answer length that encodings expect, by their questions:
            ``maskgym.backbones.expected_length``.
    """

    def __init__(self, family: Family, layout: MaskLayout, expected_answer_tokens: Expected = 1):
        self.family, self.layout = family, layout
        self.model, self.processor = family.model, family.processor
        self.signals: set[str] = set()
        self.expected_answer_tokens = expected_answer_tokens
        self._one_by_one = RLock()  # tokenizers change as they pad, and what the tower says is heard through hooks
        self.prompt_ids = lru_cache(LOOKED_UP)(self._tokenize_prompt)
        self._answer_ids = lru_cache(LOOKED_UP)(self._tokenize_answer)
        self._answer_text = lru_cache(LOOKED_UP)(self._detokenize)

    @property
    def max_positions(self) -> int:
        return self.model.config.text_config.max_position_embeddings

    def encode(self, queries: Sequence[Query]) -> Encoding:
        """Encode queries without a bank.

        Raises:
            InputError: no queries, or one that fails: without an image or with several, an image that the model cannot
                take, a question that is no text, holds the image token or is longer than the model's context; the
                message names the query.
        """
        if not queries:
            raise InputError("there are no queries to encode; give one or more")
        ids = [query.id for query in queries]
        return self.assemble(
            self.encode_images([query.the_image() for query in queries], ids),
            [query.question for query in queries],
            ids,
            [query.answers for query in queries],
        )

    @torch.no_grad()
    def encode_images(self, images: Sequence[Image.Image], ids: Sequence[str] | None = None) -> list[EncodedImage]:
        """Vision tower and projector, each image once.

        Args:
            images: RGB images.
            ids: the queries' ids, for messages.

        Raises:
            InputError: an image that the processor refuses, or whose visual tokens do not fit the layout.
        """
        with self._one_by_one:
            return self._encode_images(images, ids)

    def _encode_images(self, images: Sequence[Image.Image], ids: Sequence[str] | None) -> list[EncodedImage]:
        try:
            batch = self.pixels(images, ids)
        except InputError:
            if len(images) == 1:
                raise
            parts = [self._encode_images([image], ids and [ids[row]]) for row, image in enumerate(images)]
            return [image for part in parts for image in part]
        visual, saliency = self.family.observe(batch, sorted(self.signals))
        encoded = self.read_batch(batch, visual, ids)
        return [replace(image, saliency=own) for image, own in zip(encoded, saliency, strict=True)]

    def pixels(self, images: Sequence[Image.Image], ids: Sequence[str] | None = None) -> Any:
        """The processor's batch of images, each in an empty prompt.

        Raises:
            InputError: an image that the processor refuses, one of an extreme aspect ratio, say; the message names the
                first query.
        """
        try:
            return self.family.process(images, [self.prompt("")] * len(images))
        except ValueError as error:
            raise InputError(
                f"the processor refuses the image of {query_named(ids, 0)} ({error}); replace or remove it"
            ) from error

    def listen(self, signals: Collection[str]) -> None:
        """Ask the vision tower, from now on, for what planners read of it.

        Args:
            signals: of ``maskgym.backbones.encodings.saliency.SIGNALS``.

        Raises:
            InputError: something that this family's tower does not have.
        """
        missing = sorted(set(signals) - set(self.family.signals))
        if missing:
            raise InputError(
                f"the vision tower of {self.model.config.model_type!r} has no {missing[0]!r} ({SIGNALS[missing[0]]}); "
                f"it has {', '.join(self.family.signals) or 'no such signal'}"
            )
        self.signals |= set(signals)

    def read_batch(
        self, batch: Any, features: Sequence[Tensor], ids: Sequence[str] | None = None
    ) -> list[EncodedImage]:
        """Encoded images from the processor's batch and their visual tokens (n, D)."""
        encoded = []
        for row, visual_nD in enumerate(features):
            span = self._span(batch, row)
            is_image = span == self.model.config.image_token_id
            self._check_places(len(visual_nD), int(is_image.sum()), query_named(ids, row))
            text_offsets = (~is_image).nonzero()[:, 0]
            vision_flops, projector_flops = self.family.vision_flops(batch, row)
            encoded.append(
                EncodedImage(
                    visual_nD,
                    len(span),
                    is_image.nonzero()[:, 0],
                    tuple(span[text_offsets].tolist()),
                    tuple(text_offsets.tolist()),
                    self.family.grid(batch, row),
                    vision_flops,
                    projector_flops,
                )
            )
        return encoded

    def _span(self, batch: Any, row: int) -> Tensor:
        """Ids of the stretch of a prompt that stands for its image, on the CPU, where prompts are laid out."""
        before, after = self.prompt_ids("")
        prompt = batch["input_ids"][row][batch["attention_mask"][row].bool()]
        return prompt[len(before) : len(prompt) - len(after)].cpu()

    def _check_places(self, tokens: int, places: int, query: str) -> None:
        if tokens != places or tokens > self.layout.tokens:
            raise InputError(
                f"the image of {query} has {tokens} visual tokens, its prompt {places} places for them, the layout "
                f"{self.layout.tokens}; set max_visual_tokens, or check that processor and model match"
            )

    def span_of(self, image: Image.Image, id: str) -> int:
        """Places of an image in its prompt, by the processor alone.

        Raises:
            InputError: an image that the processor refuses, or that has more visual tokens than the layout.
        """
        span = self._span(self.pixels([image], [id]), 0)
        tokens = int((span == self.model.config.image_token_id).sum())
        self._check_places(tokens, tokens, query_named([id], 0))
        return len(span)

    def assemble(
        self,
        images: Sequence[EncodedImage],
        questions: Sequence[str],
        ids: list[str] | None = None,
        answers: list[tuple[str, ...]] | None = None,
        continuations: Sequence[list[int]] | None = None,
    ) -> Encoding:
        """Put encoded images and questions together into prompts.

        Args:
            images: the image of each question.
            questions: B questions.
            ids: the queries' ids.
            answers: the queries' accepted answers.
            continuations: ids that follow each prompt, for teacher forcing.

        Raises:
            InputError: a question that holds the image token, or a prompt longer than the model's context; the message
                names the query.
        """
        more = continuations if continuations is not None else [[]] * len(questions)
        prompts, lengths = self.fitting(questions, [image.span for image in images], ids, list(map(len, more)))
        starts = [len(before) for before, _ in prompts]
        rows = [
            _lay_out_text(before, image, after + new)
            for (before, after), image, new in zip(prompts, images, more, strict=True)
        ]
        longest = max(len(text_ids) for text_ids, _ in rows)
        device = images[0].visual_nD.device
        embed: Any = self.family.decoder.embed_tokens
        counts_B = torch.tensor([len(image.visual_nD) for image in images])
        text_counts_B = torch.tensor([len(text_ids) for text_ids, _ in rows])
        ids_BT, places_BT = (  # by NumPy, which is five times as fast as torch.tensor on lists
            torch.from_numpy(np.array([values + [0] * (longest - len(values)) for values in column], np.int64))
            for column in zip(*rows, strict=True)
        )
        offsets_BN = _padded([image.visual_offsets for image in images])
        visual_places_BN = self._to_layout(torch.tensor(starts)[:, None] + offsets_BN).to(device)
        places_BT = places_BT.to(device)
        rope_BSR = self._rope_positions(images, starts, lengths).to(device)
        return Encoding(
            visual_BND=self._to_layout(_padded([image.visual_nD for image in images])),
            visual_valid_BN=(torch.arange(self.layout.tokens) < counts_B[:, None]).to(device),
            visual_places_BN=visual_places_BN,
            visual_rope_BNR=_pick(rope_BSR, visual_places_BN),
            text_BTD=embed(ids_BT.to(device)),
            text_valid_BT=(torch.arange(longest) < text_counts_B[:, None]).to(device),
            text_places_BT=places_BT,
            text_rope_BTR=_pick(rope_BSR, places_BT),
            next_rope_B=rope_BSR.amax((1, 2)) + 1,
            vision_flops_B=torch.tensor([image.vision_flops for image in images], device=device),
            projector_flops_B=torch.tensor([image.projector_flops for image in images], device=device),
            expected_tokens=expected_tokens(self.expected_answer_tokens, questions, device),
            ids=ids or [],
            answers=answers or [],
            saliency=stack([image.saliency for image in images], self.layout.tokens),
        )

    def fitting(
        self, questions: Sequence[str], spans: Sequence[int], ids: Sequence[str] | None, room: Sequence[int]
    ) -> tuple[list[tuple[list[int], list[int]]], list[int]]:
        """Each prompt's ids before and after its image, and how many tokens it has with image and room.

        Args:
            questions: B questions.
            spans: places of each one's image.
            ids: the queries' ids, for messages.
            room: places to keep behind each prompt.

        Raises:
            InputError: as ``assemble``.
        """
        prompts = self._prompts(questions, ids)
        lengths = [
            len(before) + span + len(after) + more
            for (before, after), span, more in zip(prompts, spans, room, strict=True)
        ]
        if max(lengths) >= self.max_positions:
            asked = query_named(ids, lengths.index(max(lengths)))
            raise InputError(
                f"the prompt of {asked} has {max(lengths)} tokens with its image; "
                f"the model's context has {self.max_positions} positions: shorten the question"
            )
        return prompts, lengths

    def _to_layout(self, values_Bn: Tensor) -> Tensor:
        """Pad the second axis to the layout's N."""
        missing = self.layout.tokens - values_Bn.shape[1]
        return F.pad(values_Bn, (0, 0) * (values_Bn.dim() - 2) + (0, missing)) if missing else values_Bn

    def _rope_positions(self, images: Sequence[EncodedImage], starts: list[int], lengths: list[int]) -> Tensor:
        """Rotary position of every place of the unpruned sequences, (B, S, R), 0 where padded."""
        if not self.family.rope_needs_grid:
            places_S = torch.arange(max(lengths))
            return (places_S * (places_S < torch.tensor(lengths)[:, None]))[..., None]
        rows = []
        for image, start, length in zip(images, starts, lengths, strict=True):
            is_image_S = torch.zeros(length, dtype=torch.bool)
            is_image_S[start + image.visual_offsets] = True
            rows.append(self.family.rope(is_image_S, image.grid))
        return _padded(rows)

    def prompt(self, question: str) -> str:
        """The chat template filled with one image and the question."""
        return self.processor.apply_chat_template(_asked(question), add_generation_prompt=True, tokenize=False)

    def _prompts(self, questions: Sequence[str], ids: Sequence[str] | None) -> list[tuple[list[int], list[int]]]:
        """Each prompt's ids before and after the image placeholder."""
        prompts = []
        for row, question in enumerate(questions):
            if not isinstance(question, str):
                raise InputError(
                    f"the question of {query_named(ids, row)} is of type {type(question).__name__}; give a text"
                )
            try:
                prompts.append(self.prompt_ids(question))
            except InputError as error:
                raise InputError(f"{query_named(ids, row)}: {error}") from error
        return prompts

    def _tokenize_prompt(self, question: str) -> tuple[list[int], list[int]]:
        with self._one_by_one:
            ids = self.processor.tokenizer(self.prompt(question))["input_ids"]
        image = self.model.config.image_token_id
        if ids.count(image) != 1:
            raise InputError(
                f"the prompt has {ids.count(image)} image placeholders; it must have one: "
                "remove the image token from the question"
            )
        place = ids.index(image)
        return ids[:place], ids[place + 1 :]

    def answer_ids(self, answer: str) -> list[int]:
        """Ids of an answer's text as it follows the prompt, without an end token."""
        return list(self._answer_ids(answer))

    def _tokenize_answer(self, answer: str) -> tuple[int, ...]:
        return tuple(self._tokenize_answers([answer])[0])

    def _tokenize_answers(self, answers: Sequence[str]) -> list[list[int]]:
        """The ids by which each answer continues the prompt's; those of its text alone, where it would change these."""
        before, prompt_ids = self._before_answers
        start, tokenizer = len(prompt_ids), self.processor.tokenizer
        with self._one_by_one:
            chats = tokenizer([before + answer for answer in answers])["input_ids"]
            return [
                ids[start:]
                if answer and ids[:start] == prompt_ids
                else tokenizer(answer, add_special_tokens=False)["input_ids"]
                for answer, ids in zip(answers, chats, strict=True)
            ]

    @cached_property
    def _before_answers(self) -> tuple[str, list[int]]:
        """A prompt with the space that the chat template has between it and an answer, if any; and the prompt's ids."""
        prompt, word = self.prompt(""), "answer"
        messages = [*_asked(""), {"role": "assistant", "content": [{"type": "text", "text": word}]}]
        try:
            chat = self.processor.apply_chat_template(messages, tokenize=False)
        except (TemplateError, TypeError):  # a template for prompts alone
            chat = prompt
        between = chat[len(prompt) :].partition(word)[0] if chat.startswith(prompt) else ""
        with self._one_by_one:
            return prompt if between.strip() else prompt + between, self.processor.tokenizer(prompt)["input_ids"]

    def answer_lengths(self, answers: Sequence[str]) -> list[int]:
        """How many ids ``answer_ids`` has for each of many answers."""
        if not answers:
            return []
        return [len(ids) for ids in self._tokenize_answers(answers)]

    def answer_text(self, ids: Sequence[int]) -> str:
        """An answer of these ids, special tokens removed."""
        return self._answer_text(tuple(ids))

    def _detokenize(self, ids: tuple[int, ...]) -> str:
        with self._one_by_one:
            return self.processor.tokenizer.decode(list(ids), skip_special_tokens=True).strip()


def _asked(question: str) -> list[dict[str, Any]]:
    """A chat that so far has an image and a question."""
    return [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]}]


def _lay_out_text(before: list[int], image: EncodedImage, after: list[int]) -> tuple[list[int], list[int]]:
    """Ids of a prompt's text and their places in the unpruned sequence."""
    start = len(before)
    end = start + image.span
    inner = [start + offset for offset in image.text_offsets]
    return [*before, *image.text_ids, *after], [*range(start), *inner, *range(end, end + len(after))]


def _pick(rope_BSR: Tensor, places_BX: Tensor) -> Tensor:
    """Rotary positions (B, X, R) of some places of each row."""
    return rope_BSR.gather(1, places_BX[..., None].expand(-1, -1, rope_BSR.shape[2]))


def _padded(rows: list[Tensor]) -> Tensor:
    """The rows as one tensor, padded at the end with zeros; equally long ones, as most are, in half the time."""
    if len({len(row) for row in rows}) == 1:
        return torch.stack(rows)
    return pad_sequence(rows, batch_first=True)
