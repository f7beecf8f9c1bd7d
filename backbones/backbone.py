"""A VLM that answers under a plan, whatever its family.

Shape legend: B rows, N visual tokens, n of one image, T text tokens, P packed tokens, D hidden width, R rotary position
components, V vocabulary, t new tokens.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from threading import RLock
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from backbones.arrange import arrange
from backbones.cost import Cost
from backbones.decoder import MaskedDecoder
from backbones.encoding import EncodedImage, Encoding, Query
from backbones.errors import InputError, check_count
from backbones.family import Family
from backbones.kv_cache import KVCache
from backbones.masks import MaskLayout, Masks
from backbones.packed import Packed, pack
from backbones.plan_cost import making_flops
from backbones.saliency import SIGNALS, stack
from backbones.stages import token_counts


@dataclass(frozen=True)
class Answers:
    """What the backbone said under a batch of plans.

    Attributes:
        texts: the answers, special tokens removed.
        tokens: the generated ids of each answer, up to and without the end token.
        log_likelihood: (B,) log-probability of each query's reference answer, if references were given.
        masks: the plans as they were executed: decisions inside the decoder are taken.
    """

    texts: list[str]
    tokens: list[list[int]]
    log_likelihood: Tensor | None
    masks: Masks


class Backbone:
    """A Hugging Face VLM, used in place and not changed, that answers under a plan.

    Several threads may use it at once; processor and vision tower then serve them one by one.

    Args:
        family: the model and what is particular to its kind.
        name: how the backbone is called in records.
        heads: head slots per layer; default one for every key-value head. At most one for every query head: a
            key-value head is dropped when all its query heads are.
        width: ``"heads+mlp"``: a head slot takes its slice of the MLP with it; ``"heads"``: the MLP stays whole.
        protected_layers: layers that always run in full.
        expected_answer_tokens: answer length at which plans are priced.
        max_visual_tokens: scale images so that none has more visual tokens; for families of dynamic resolution.
        attention: ``"auto"``, ``"sdpa"``, or ``"flash"`` for FlashAttention-2, which auto takes where it can run.
    """

    def __init__(
        self,
        family: Family,
        name: str,
        heads: int | None = None,
        width: str = "heads+mlp",
        protected_layers: Sequence[int] = (0,),
        expected_answer_tokens: int = 1,
        max_visual_tokens: int | None = None,
        attention: str = "auto",
    ):
        self.family, self.name = family, name
        self.model, self.processor = family.model, family.processor
        if max_visual_tokens is not None:
            family.limit_visual_tokens(max_visual_tokens)
        text = self.model.config.text_config
        slots = text.num_key_value_heads if heads is None else heads
        for option, count in (("heads", slots), ("expected_answer_tokens", expected_answer_tokens)):
            check_count(option, count)
        self.decoder = MaskedDecoder(family.decoder, self.model.lm_head, slots, width, attention)
        self.layout = MaskLayout(
            family.most_visual_tokens, text.num_hidden_layers, self.decoder.slots, tuple(protected_layers)
        )
        self.hidden = text.hidden_size
        self.signals: set[str] = set()
        self.expected_answer_tokens, self.max_visual_tokens = expected_answer_tokens, max_visual_tokens
        self._one_by_one = RLock()  # tokenizers change as they pad, and what the tower says is heard through hooks
        self.prompt_ids = lru_cache(maxsize=65536)(self._tokenize_prompt)
        self._answer_ids = lru_cache(maxsize=65536)(self._tokenize_answer)
        self._decode_ids = lru_cache(maxsize=65536)(self._detokenize)

    @property
    def options(self) -> dict[str, Any]:
        """Those that make the same of the same model; ``attention`` is a matter of the device."""
        return {
            "heads": self.layout.heads,
            "width": self.decoder.width,
            "protected_layers": self.layout.protected_layers,
            "expected_answer_tokens": self.expected_answer_tokens,
            "max_visual_tokens": self.max_visual_tokens,
        }

    @property
    def device(self) -> torch.device:
        return self.model.device

    @property
    def max_positions(self) -> int:
        return self.model.config.text_config.max_position_embeddings

    # Encoding

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
            batch = self.family.process(images, [self.prompt("")] * len(images))
        except ValueError as error:  # an extreme aspect ratio, say
            if len(images) == 1:
                raise InputError(
                    f"the processor refuses the image of {_called(ids, 0)} ({error}); replace or remove it"
                ) from error
            parts = [self._encode_images([image], ids and [ids[row]]) for row, image in enumerate(images)]
            return [image for part in parts for image in part]
        visual, saliency = self.family.observe(batch, sorted(self.signals))
        encoded = self.read_batch(batch, visual, ids)
        return [replace(image, saliency=own) for image, own in zip(encoded, saliency, strict=True)]

    def listen(self, signals: Collection[str]) -> None:
        """Ask the vision tower, from now on, for what planners read of it.

        Args:
            signals: of ``backbones.saliency.SIGNALS``.

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
        before, after = self.prompt_ids("")
        encoded = []
        for row, visual_nD in enumerate(features):
            prompt = batch["input_ids"][row][batch["attention_mask"][row].bool()]
            span = prompt[len(before) : len(prompt) - len(after)]
            is_image = span == self.model.config.image_token_id
            if int(is_image.sum()) != len(visual_nD) or len(visual_nD) > self.layout.tokens:
                raise InputError(
                    f"the image of {_called(ids, row)} has {len(visual_nD)} visual tokens, its prompt "
                    f"{int(is_image.sum())} places for them, the layout {self.layout.tokens}; set max_visual_tokens, "
                    "or check that processor and model match"
                )
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
        prompts = self._prompts(questions, ids)
        more = continuations if continuations is not None else [[]] * len(prompts)
        starts = [len(before) for before, _ in prompts]
        rows = [
            _lay_out_text(before, image, after + new)
            for (before, after), image, new in zip(prompts, images, more, strict=True)
        ]
        longest = max(len(text_ids) for text_ids, _ in rows)
        lengths = [len(text_ids) + len(image.visual_nD) for (text_ids, _), image in zip(rows, images, strict=True)]
        if max(lengths) >= self.max_positions:
            raise InputError(
                f"the prompt of {_called(ids, lengths.index(max(lengths)))} has {max(lengths)} tokens with its image; "
                f"the model's context has {self.max_positions} positions: shorten the question"
            )
        device = images[0].visual_nD.device
        counts_B = torch.tensor([len(image.visual_nD) for image in images])
        text_counts_B = torch.tensor([len(text_ids) for text_ids, _ in rows])
        ids_BT, places_BT = (
            torch.tensor([values + [0] * (longest - len(values)) for values in column])
            for column in zip(*rows, strict=True)
        )
        offsets_BN = pad_sequence([image.visual_offsets for image in images], batch_first=True)
        visual_places_BN = self._to_layout(torch.tensor(starts)[:, None] + offsets_BN).to(device)
        places_BT = places_BT.to(device)
        rope_BSR = self._rope_positions(images, starts, lengths).to(device)
        return Encoding(
            visual_BND=self._to_layout(pad_sequence([image.visual_nD for image in images], batch_first=True)),
            visual_valid_BN=(torch.arange(self.layout.tokens) < counts_B[:, None]).to(device),
            visual_places_BN=visual_places_BN,
            visual_rope_BNR=_pick(rope_BSR, visual_places_BN),
            text_BTD=self.decoder.model.embed_tokens(ids_BT.to(device)),
            text_valid_BT=(torch.arange(longest) < text_counts_B[:, None]).to(device),
            text_places_BT=places_BT,
            text_rope_BTR=_pick(rope_BSR, places_BT),
            next_rope_B=rope_BSR.amax((1, 2)) + 1,
            vision_flops_B=torch.tensor([image.vision_flops for image in images], device=device),
            projector_flops_B=torch.tensor([image.projector_flops for image in images], device=device),
            ids=ids or [],
            answers=answers or [],
            saliency=stack([image.saliency for image in images], self.layout.tokens),
        )

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
        return pad_sequence(rows, batch_first=True)

    def prompt(self, question: str) -> str:
        """The chat template filled with one image and the question."""
        content = [{"type": "image"}, {"type": "text", "text": question}]
        return self.processor.apply_chat_template(
            [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=False
        )

    def _prompts(self, questions: Sequence[str], ids: Sequence[str] | None) -> list[tuple[list[int], list[int]]]:
        """Each prompt's ids before and after the image placeholder."""
        prompts = []
        for row, question in enumerate(questions):
            if not isinstance(question, str):
                raise InputError(
                    f"the question of {_called(ids, row)} is of type {type(question).__name__}; give a text"
                )
            try:
                prompts.append(self.prompt_ids(question))
            except InputError as error:
                raise InputError(f"{_called(ids, row)}: {error}") from error
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
        with self._one_by_one:
            return tuple(self.processor.tokenizer(answer, add_special_tokens=False)["input_ids"])

    def _detokenize(self, ids: tuple[int, ...]) -> str:
        with self._one_by_one:
            return self.processor.tokenizer.decode(list(ids), skip_special_tokens=True).strip()

    # Execution

    def full(self, encoding: Encoding) -> Masks:
        """The plan that keeps everything that is there."""
        return self.restrict(encoding, self.layout.full(len(encoding), encoding.visual_BND.device))

    def restrict(self, encoding: Encoding, masks: Masks) -> Masks:
        """The plans without the visual tokens that an image does not have.

        Raises:
            InputError: masks of another layout, number of rows, type or device, or a plan without layers or without
                protected ones.
        """
        layout, rows = self.layout, len(encoding)
        parts = {"(queries, visual tokens)": masks.tokens, "(queries, layers, heads)": masks.heads}
        parts["(queries, layers)"] = masks.layers
        shapes = [tuple(part.shape) for part in parts.values()]
        expected = [(rows, layout.tokens), (rows, layout.layers, layout.heads), (rows, layout.layers)]
        if shapes != expected:
            given = ", ".join(f"{name} {shape}" for name, shape in zip(parts, shapes, strict=True))
            raise InputError(f"the masks are for {given}; here they must be {', '.join(map(str, expected))}")
        device = encoding.visual_BND.device
        for name, part in parts.items():
            if part.dtype != torch.bool or part.device != device:
                raise InputError(
                    f"the mask {name} is of {part.dtype} on {part.device}; it must be of torch.bool on {device}"
                )
        if not bool(masks.layers.any(1).all()):
            row = int((~masks.layers.any(1)).nonzero()[0])
            raise InputError(f"the plan at row {row} keeps no layer; a plan must keep at least one")
        protected = list(layout.protected_layers)
        if protected and not bool(masks.heads[:, protected].all() & masks.layers[:, protected].all()):
            raise InputError(
                f"a plan drops layer {protected[0]}, or head slots of it, or of another of the protected layers "
                f"{', '.join(map(str, protected))}; these always run in full: make plans by layout.unflatten"
            )
        for stage in masks.stages:
            if not 0 <= stage.layer < layout.layers:
                raise InputError(f"a stage stands before layer {stage.layer}; the layers are 0 to {layout.layers - 1}")
        if masks.midway is not None and not 0 < masks.midway.layer < layout.layers:
            raise InputError(
                f"a decision stands before layer {masks.midway.layer}; it must stand before one of 1 to "
                f"{layout.layers - 1}"
            )
        return replace(masks, tokens=masks.tokens & encoding.visual_valid_BN)

    def pack(self, encoding: Encoding, masks: Masks) -> Packed:
        """The kept visual tokens and the text in sequence order, as the plans lay them out."""
        arranged = arrange(encoding, masks)
        return pack(arranged.encoding, masks, arranged.sizes_BN, arranged.restored_B)

    def prefill(self, encoding: Encoding, masks: Masks, cache: bool = False) -> tuple[Tensor, KVCache | None]:
        """Logits of the first answer token (B, V) under each row's plan; differentiable."""
        logits_BV, kv, _ = self._prefill(encoding, masks, cache)
        return logits_BV, kv

    def _prefill(self, encoding: Encoding, masks: Masks, cache: bool) -> tuple[Tensor, KVCache | None, Masks]:
        masks = self.restrict(encoding, masks)
        arranged = arrange(encoding, masks)
        asked = arranged.encoding if masks.midway is None else masks.midway.append_to(arranged.encoding)
        tokens = pack(asked, masks, arranged.sizes_BN, arranged.restored_B)
        tokens, kv, executed = self.decoder.run(tokens, masks, cache)
        if kv is not None and asked is not encoding:
            kv.moved_B = encoding.next_rope_B - asked.next_rope_B
        return self.model.lm_head(tokens.x_PD[tokens.ragged.last]), kv, executed

    @torch.no_grad()
    def answer(
        self,
        encoding: Encoding,
        masks: Masks,
        max_new_tokens: int = 1,
        references: Sequence[str] | None = None,
    ) -> Answers:
        """Answer greedily, each row under its own plan.

        Args:
            encoding: B queries.
            masks: B plans.
            max_new_tokens: answers are cut at this many tokens.
            references: one answer a row whose log-likelihood is wanted, from the same prefill.

        Raises:
            InputError: no tokens to answer with, other numbers of references than rows, or one without tokens.
        """
        check_count("max_new_tokens", max_new_tokens)
        reference_ids = None if references is None else self._reference_ids(references, encoding)
        longest = max((len(ids) for ids in reference_ids or []), default=0)
        logits_BV, kv, masks = self._prefill(encoding, masks, max_new_tokens > 1 or longest > 1)
        likelihood = None
        if reference_ids is not None:
            likelihood = self._score(logits_BV, reference_ids, encoding, kv)
        *_, tokens = self._generate(logits_BV, max_new_tokens, encoding, kv)
        return Answers([self._decode_ids(tuple(ids)) for ids in tokens], tokens, likelihood, masks)

    @torch.no_grad()
    def stream(self, encoding: Encoding, masks: Masks, max_new_tokens: int = 1) -> Iterator[Answers]:
        """The answers so far after each step; the last are those of ``answer`` with the same arguments."""
        check_count("max_new_tokens", max_new_tokens)
        logits_BV, kv, masks = self._prefill(encoding, masks, max_new_tokens > 1)
        for tokens in self._generate(logits_BV, max_new_tokens, encoding, kv):
            yield Answers([self._decode_ids(tuple(ids)) for ids in tokens], [list(ids) for ids in tokens], None, masks)

    def log_likelihood(self, encoding: Encoding, masks: Masks, answers: Sequence[str]) -> Tensor:
        """Log-probability of each row's answer text under its plan, (B,) float32 (summed over its tokens)."""
        result = self.answer(encoding, masks, max_new_tokens=1, references=answers).log_likelihood
        assert result is not None
        return result

    def _reference_ids(self, references: Sequence[str], encoding: Encoding) -> list[list[int]]:
        if len(references) != len(encoding):
            raise InputError(f"{len(references)} references were given for {len(encoding)} queries; give one each")
        ids = [self.answer_ids(reference) for reference in references]
        empty = next((row for row, own in enumerate(ids) if not own), None)
        if empty is not None:
            raise InputError(
                f"the answer {references[empty]!r} of {_called(encoding.ids, empty)} has no tokens, so no likelihood; "
                "give it a text, or leave the query out"
            )
        return ids

    def _score(self, logits_BV: Tensor, references: list[list[int]], encoding: Encoding, kv: KVCache | None) -> Tensor:
        """Teacher-forced log-probability of the references, read off a fork of the cache."""
        ids_Bt = torch.nn.utils.rnn.pad_sequence(
            [torch.tensor(ids, dtype=torch.long) for ids in references], batch_first=True
        ).to(logits_BV.device)
        counts = torch.tensor([len(ids) for ids in references], device=logits_BV.device)
        if ids_Bt.shape[1] == 0:
            return logits_BV.new_zeros(len(references))
        steps = [logits_BV[:, None]]
        if ids_Bt.shape[1] > 1:
            assert kv is not None
            steps.append(self.extend(ids_Bt[:, :-1], encoding.next_rope_B, kv.fork()))
        log_probs = torch.cat(steps, dim=1).float().log_softmax(-1).gather(2, ids_Bt[..., None])[..., 0]
        within = torch.arange(ids_Bt.shape[1], device=counts.device) < counts[:, None]
        return (log_probs * within).sum(1)

    def extend(self, ids_Bt: Tensor, next_rope_B: Tensor, kv: KVCache) -> Tensor:
        """Logits (B, t, V) after t more tokens a row, the first at rotary position ``next_rope_B`` of the unpruned
        sequence."""
        if kv.moved_B is not None:
            next_rope_B = next_rope_B - kv.moved_B
        steps = torch.arange(ids_Bt.shape[1], device=ids_Bt.device)
        components = 3 if self.family.rope_needs_grid else 1
        rope_BtR = (next_rope_B[:, None] + steps)[..., None].expand(-1, -1, components)
        return self.model.lm_head(self.decoder.extend(self.decoder.model.embed_tokens(ids_Bt), rope_BtR, kv))

    def _generate(
        self, logits_BV: Tensor, max_new_tokens: int, encoding: Encoding, kv: KVCache | None
    ) -> Iterator[list[list[int]]]:
        """The ids of all answers after each step, in lists that grow."""
        ends = self.model.generation_config.eos_token_id
        ends = {ends} if isinstance(ends, int) else set(ends or ())
        answers: list[list[int]] = [[] for _ in range(len(logits_BV))]
        open_rows = [True] * len(answers)
        for step in range(max_new_tokens):
            next_B = logits_BV.argmax(-1)
            for row, token in enumerate(next_B.tolist()):
                open_rows[row] = open_rows[row] and token not in ends
                if open_rows[row]:
                    answers[row].append(token)
            yield answers
            if not any(open_rows) or step + 1 == max_new_tokens:
                return
            assert kv is not None
            logits_BV = self.extend(next_B[:, None], encoding.next_rope_B + step, kv)[:, 0]

    # Cost

    def cost(
        self, encoding: Encoding, masks: Masks, controller: int | Tensor = 0, new_tokens: int | Tensor | None = None
    ) -> Cost:
        """FLOPs of B plans, priced at the expected answer length unless ``new_tokens`` says what was spent.

        Args:
            encoding: B queries.
            masks: B plans.
            controller: FLOPs of the controller that chose each plan, one number or (B,). What the plan says of its own
                making, and what its stages' scores and its layout cost, is added.
            new_tokens: answer tokens, one for all rows or (B,).
        """
        shape = self.decoder.shape
        masks = replace(masks, tokens=masks.tokens & encoding.visual_valid_BN)
        n_BL = self.sequence_lengths(encoding, masks)
        answer = self.expected_answer_tokens if new_tokens is None else new_tokens
        making_B = making_flops(shape, masks, encoding.visual_valid_BN.sum(1), encoding.text_tokens + masks.appended)
        return Cost(
            vision=encoding.vision_flops_B,
            projector=encoding.projector_flops_B,
            controller=making_B + controller,
            prefill=shape.prefill(masks, n_BL),
            decode=shape.decode(masks, n_BL, answer),
        )

    def visual_counts(self, masks: Masks) -> Tensor:
        """(B, L) visual tokens in each layer under restricted plans."""
        return token_counts(masks.tokens.sum(1), masks.stages, self.layout.layers)

    def sequence_lengths(self, encoding: Encoding, masks: Masks) -> Tensor:
        """(B, L) tokens in each layer, text and visual, under restricted plans."""
        return self.visual_counts(masks) + (encoding.text_tokens + masks.appended)[:, None]

    def full_llm_flops(self, encoding: Encoding) -> Tensor:
        """(B,) FLOPs of the full plan's prefill and decode: what a budget of 1 is a share of."""
        return self.cost(encoding, self.full(encoding)).llm


def _called(ids: Sequence[str] | None, row: int) -> str:
    return f"query {ids[row]!r}" if ids else f"the query at row {row}"


def _lay_out_text(before: list[int], image: EncodedImage, after: list[int]) -> tuple[list[int], list[int]]:
    """Ids of a prompt's text and their places in the unpruned sequence."""
    start = len(before)
    end = start + image.span
    inner = [start + offset for offset in image.text_offsets]
    return [*before, *image.text_ids, *after], [*range(start), *inner, *range(end, end + len(after))]


def _pick(rope_BSR: Tensor, places_BX: Tensor) -> Tensor:
    """Rotary positions (B, X, R) of some places of each row."""
    return rope_BSR.gather(1, places_BX[..., None].expand(-1, -1, rope_BSR.shape[2]))
