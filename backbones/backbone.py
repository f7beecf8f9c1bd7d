"""A VLM that answers under a plan, whatever its family.

Shape legend: B rows, N visual tokens, L layers, P packed tokens, D hidden width, R rotary position components, V
vocabulary, t new tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from maskgym.backbones.answers import Answers, Limit, Said
from maskgym.backbones.encodings.encoding import Encoding
from maskgym.backbones.engine.arrange import arrange
from maskgym.backbones.engine.decoder import MaskedDecoder
from maskgym.backbones.engine.kv_cache import KVCache
from maskgym.backbones.engine.packed import Packed, pack
from maskgym.backbones.expected_length import Expected, check_expected
from maskgym.backbones.families.family import Family
from maskgym.backbones.plans.cost import Cost
from maskgym.backbones.plans.masks import MaskLayout, Masks
from maskgym.backbones.plans.plan_cost import making_flops
from maskgym.backbones.plans.stages import token_counts
from maskgym.backbones.query_encoder import QueryEncoder
from maskgym.common.errors import InputError, check_count, query_named


class Backbone(QueryEncoder):
    """A Hugging Face VLM, used in place and not changed, that answers under a plan.

    It encodes queries as every ``QueryEncoder`` does; here are plans, answers and what they cost.

    Args:
        family: the model and what is particular to its kind.
        name: how the backbone is called in records.
        heads: head slots per layer; default one for every key-value head. At most one for every query head: a
            key-value head is dropped when all its query heads are.
        width: ``"heads+mlp"``: a head slot takes its slice of the MLP with it; ``"heads"``: the MLP stays whole.
        protected_layers: layers that always run in full.
        expected_answer_tokens: answer length at which plans are priced: a number of tokens, or a tree of questions'
            words with such numbers (``maskgym.backbones.expected_length``).
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
        expected_answer_tokens: Expected = 1,
        max_visual_tokens: int | None = None,
        attention: str = "auto",
    ):
        if max_visual_tokens is not None:
            family.limit_visual_tokens(max_visual_tokens)
        text = family.model.config.text_config
        slots = text.num_key_value_heads if heads is None else heads
        check_count("heads", slots)
        self.decoder = MaskedDecoder(family.decoder, family.model.lm_head, slots, width, attention)
        layout = MaskLayout(
            family.most_visual_tokens, text.num_hidden_layers, self.decoder.slots, tuple(protected_layers)
        )
        super().__init__(family, layout, check_expected(expected_answer_tokens))
        self.name, self.hidden = name, text.hidden_size
        self.max_visual_tokens = max_visual_tokens

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
        limit: Limit | None = None,
    ) -> Answers:
        """Answer greedily, each row under its own plan.

        Args:
            encoding: B queries.
            masks: B plans.
            max_new_tokens: answers are cut at this many tokens.
            references: one answer a row whose log-likelihood is wanted, from the same prefill.
            limit: answers are also cut where one more token would cost more than it; the first, which comes out of the
                prefill, is always said.

        Raises:
            InputError: no tokens to answer with, other numbers of references than rows, or one without tokens.
        """
        check_count("max_new_tokens", max_new_tokens)
        if references is not None and len(references) != len(encoding):
            raise InputError(f"{len(references)} references were given for {len(encoding)} queries; give one each")
        reference_ids = None if references is None else self.reference_ids(references, encoding.ids)
        longest = max((len(ids) for ids in reference_ids or []), default=0)
        logits_BV, kv, masks = self._prefill(encoding, masks, max_new_tokens > 1 or longest > 1)
        likelihood = None
        if reference_ids is not None:
            likelihood = self._score(logits_BV, reference_ids, encoding, kv)
        *_, said = self._generate(logits_BV, self._said(encoding, masks, max_new_tokens, limit), encoding, kv)
        return self._answers(said, likelihood, masks)

    @torch.no_grad()
    def stream(
        self, encoding: Encoding, masks: Masks, max_new_tokens: int = 1, limit: Limit | None = None
    ) -> Iterator[Answers]:
        """The answers so far after each step; the last are those of ``answer`` with the same arguments."""
        check_count("max_new_tokens", max_new_tokens)
        logits_BV, kv, masks = self._prefill(encoding, masks, max_new_tokens > 1)
        for said in self._generate(logits_BV, self._said(encoding, masks, max_new_tokens, limit), encoding, kv):
            yield self._answers(said, None, masks)

    def _said(self, encoding: Encoding, masks: Masks, max_new_tokens: int, limit: Limit | None) -> Said:
        """Answers that have not begun, each with its room."""
        ends = self.model.generation_config.eos_token_id
        room = [max_new_tokens] * len(encoding)
        if limit is not None:
            room = self.affordable_tokens(encoding, masks, limit, max_new_tokens).tolist()
        return Said(room, max_new_tokens, {ends} if isinstance(ends, int) else set(ends or ()))

    def _answers(self, said: Said, likelihood: Tensor | None, masks: Masks) -> Answers:
        texts, tokens = [self.answer_text(ids) for ids in said.tokens], [list(ids) for ids in said.tokens]
        return Answers(texts, tokens, likelihood, masks, list(said.generated), said.cut)

    def log_likelihood(self, encoding: Encoding, masks: Masks, answers: Sequence[str]) -> Tensor:
        """Log-probability of each row's answer text under its plan, (B,) float32 (summed over its tokens)."""
        result = self.answer(encoding, masks, max_new_tokens=1, references=answers).log_likelihood
        assert result is not None
        return result

    def reference_ids(self, references: Sequence[str], query_ids: Sequence[str]) -> list[list[int]]:
        """Ids of the answers whose log-likelihood is wanted.

        Raises:
            InputError: an answer without tokens; the message names its query, by id if there are ids.
        """
        ids = [self.answer_ids(reference) for reference in references]
        empty = next((row for row, own in enumerate(ids) if not own), None)
        if empty is not None:
            raise InputError(
                f"the answer {references[empty]!r} of {query_named(query_ids, empty)} has no tokens, so no "
                "likelihood; give it a text, or leave the query out"
            )
        return ids

    def _score(self, logits_BV: Tensor, references: list[list[int]], encoding: Encoding, kv: KVCache | None) -> Tensor:
        """Teacher-forced log-probability of the references, read off a fork of the cache."""
        ids_Bt = pad_sequence([torch.tensor(ids, dtype=torch.long) for ids in references], batch_first=True).to(
            logits_BV.device
        )
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

    def _generate(self, logits_BV: Tensor, said: Said, encoding: Encoding, kv: KVCache | None) -> Iterator[Said]:
        """All answers after each step."""
        for step in range(max(said.room)):
            next_B = logits_BV.argmax(-1)
            said.add(next_B.tolist())
            yield said
            if not any(said.open):
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
        answer = encoding.expected_tokens if new_tokens is None else new_tokens
        making_B = making_flops(shape, masks, encoding.visual_valid_BN.sum(1), encoding.text_tokens + masks.appended)
        return Cost(
            vision=encoding.vision_flops_B,
            projector=encoding.projector_flops_B,
            controller=making_B + controller,
            prefill=shape.prefill(masks, n_BL),
            decode=shape.decode(masks, n_BL, answer),
        )

    def affordable_tokens(self, encoding: Encoding, masks: Masks, limit: Limit, most: int) -> Tensor:
        """(B,) int64 tokens, from 1 to ``most``, that each answer may have, the one that ends it included, so that it
        costs no more than its limit under its plan; 1 where even that costs more."""
        low_B, high_B = torch.ones_like(limit.flops_B), torch.full_like(limit.flops_B, most)
        while bool((low_B < high_B).any()):
            middle_B = (low_B + high_B + 1) // 2
            fits_B = self.cost(encoding, masks, limit.controller, middle_B).llm <= limit.flops_B
            low_B, high_B = torch.where(fits_B, middle_B, low_B), torch.where(fits_B, high_B, middle_B - 1)
        return low_B

    def visual_counts(self, masks: Masks) -> Tensor:
        """(B, L) visual tokens in each layer under restricted plans."""
        return token_counts(masks.tokens.sum(1), masks.stages, self.layout.layers)

    def sequence_lengths(self, encoding: Encoding, masks: Masks) -> Tensor:
        """(B, L) tokens in each layer, text and visual, under restricted plans."""
        return self.visual_counts(masks) + (encoding.text_tokens + masks.appended)[:, None]

    def full_llm_flops(self, encoding: Encoding) -> Tensor:
        """(B,) FLOPs of the full plan's prefill and decode: what a budget of 1 is a share of."""
        return self.cost(encoding, self.full(encoding)).llm
