"""LLaVA-1.5-style backbones on stock ``transformers``: CLIP tower, MLP projector, Llama decoder.

Shape legend: B rows, N visual tokens, T text tokens, S sequence, P packed tokens, D hidden width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from backbones.cost import Cost, clip_tower_flops, mlp_flops
from backbones.decoder import KVCache, MaskedDecoder
from backbones.encoding import Encoding, Query
from backbones.errors import InputError
from backbones.masks import MaskLayout, Masks
from backbones.ragged import Ragged


@dataclass(frozen=True)
class Answers:
    """What the backbone said under a batch of plans.

    Attributes:
        texts: the answers, special tokens removed.
        tokens: the generated ids of each answer, up to and without the end token.
        log_likelihood: (B,) log-probability of each query's reference answer, if references were given.
    """

    texts: list[str]
    tokens: list[list[int]]
    log_likelihood: Tensor | None = None


class LlavaBackbone:
    """A ``LlavaForConditionalGeneration`` that answers under a plan.

    Args:
        model: the model, used in place and not changed.
        processor: its processor, with a chat template.
        name: how the backbone is called in records.
        heads: head slots per layer; default every key-value head is one.
        width: ``"heads+mlp"``: a head slot takes its slice of the MLP with it; ``"heads"``: the MLP stays whole.
        protected_layers: layers that always run in full.
        expected_answer_tokens: answer length at which plans are priced.
    """

    def __init__(
        self,
        model: Any,
        processor: Any,
        name: str,
        heads: int | None = None,
        width: str = "heads+mlp",
        protected_layers: Sequence[int] = (0,),
        expected_answer_tokens: int = 1,
    ):
        self.model, self.processor, self.name = model, processor, name
        config = model.config
        text, vision = config.text_config, config.vision_config
        self.decoder = MaskedDecoder(
            model.model.language_model, model.lm_head, heads or text.num_key_value_heads, width
        )
        patches = (vision.image_size // vision.patch_size) ** 2
        tokens = patches + (config.vision_feature_select_strategy == "full")
        self.layout = MaskLayout(tokens, text.num_hidden_layers, self.decoder.slots, tuple(protected_layers))
        self.hidden = text.hidden_size
        self.expected_answer_tokens = expected_answer_tokens
        self.vision_flops = clip_tower_flops(
            vision.image_size,
            vision.patch_size,
            vision.num_channels,
            vision.hidden_size,
            vision.num_hidden_layers,
            vision.intermediate_size,
        )
        feature_layer = config.vision_feature_layer
        features = 1 if isinstance(feature_layer, int) else len(feature_layer)
        self.projector_flops = mlp_flops(tokens, vision.hidden_size * features, self.hidden, self.hidden)
        self._prompt_ids = lru_cache(maxsize=65536)(self._tokenize_prompt)
        self._decode_ids = lru_cache(maxsize=65536)(self._detokenize)

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
            InputError: a question longer than the model's context.
        """
        visual_BND = self.encode_images([query.image for query in queries])
        return self.assemble(
            visual_BND,
            [query.question for query in queries],
            [query.id for query in queries],
            [query.answers for query in queries],
        )

    @torch.no_grad()
    def encode_images(self, images: Sequence[Image.Image]) -> Tensor:
        """Vision tower and projector: (B, N, D)."""
        pixels = self.processor.image_processor(list(images), return_tensors="pt")["pixel_values"]
        return self.project_pixels(pixels.to(self.device, self.model.dtype))

    def project_pixels(self, pixels: Tensor) -> Tensor:
        """Visual tokens (B, N, D) of preprocessed images (B, C, H, W); differentiable."""
        features = self.model.model.get_image_features(pixel_values=pixels, return_dict=True).pooler_output
        return torch.stack(list(features))

    def assemble(
        self,
        visual_BND: Tensor,
        questions: Sequence[str],
        ids: list[str] | None = None,
        answers: list[tuple[str, ...]] | None = None,
        continuations: Sequence[list[int]] | None = None,
    ) -> Encoding:
        """Put visual tokens and questions together into the prompt's sequence.

        Args:
            visual_BND: visual tokens of the image of each question.
            questions: B questions.
            ids: the queries' ids.
            answers: the queries' accepted answers.
            continuations: ids that follow each prompt, for teacher forcing.
        """
        prompts = [self._prompt_ids(question) for question in questions]
        if continuations is not None:
            prompts = [(before, after + more) for (before, after), more in zip(prompts, continuations, strict=True)]
        tokens = visual_BND.shape[1]
        longest = max(len(before) + len(after) for before, after in prompts)
        if longest + tokens >= self.max_positions:
            raise InputError(
                f"a question needs {longest} text tokens beside {tokens} visual ones; the model's context has "
                f"{self.max_positions} positions: shorten the question"
            )
        rows = [_lay_out(before, after, tokens, longest) for before, after in prompts]
        ids_BT, positions_BT, valid_BT = (torch.tensor(column) for column in zip(*rows, strict=True))
        starts_B = torch.tensor([len(before) for before, _ in prompts])
        device = visual_BND.device
        return Encoding(
            visual_BND,
            (starts_B[:, None] + torch.arange(tokens)).to(device),
            self.decoder.model.embed_tokens(ids_BT.to(device)),
            positions_BT.to(device),
            valid_BT.bool().to(device),
            ids or [],
            answers or [],
        )

    def prompt(self, question: str) -> str:
        """The chat template filled with one image and the question."""
        content = [{"type": "image"}, {"type": "text", "text": question}]
        return self.processor.apply_chat_template(
            [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=False
        )

    def _tokenize_prompt(self, question: str) -> tuple[list[int], list[int]]:
        """Ids before and after the image placeholder."""
        ids = self.processor.tokenizer(self.prompt(question))["input_ids"]
        image = self.model.config.image_token_id
        if ids.count(image) != 1:
            raise InputError(
                f"the prompt for question {question!r} has {ids.count(image)} image placeholders; it must have one: "
                "remove the image token from the question"
            )
        place = ids.index(image)
        return ids[:place], ids[place + 1 :]

    def answer_ids(self, answer: str) -> list[int]:
        """Ids of an answer's text as it follows the prompt, without an end token."""
        return self.processor.tokenizer(answer, add_special_tokens=False)["input_ids"]

    def _detokenize(self, ids: tuple[int, ...]) -> str:
        return self.processor.tokenizer.decode(list(ids), skip_special_tokens=True).strip()

    # Execution

    def pack(self, encoding: Encoding, masks: Masks) -> tuple[Tensor, Ragged, Tensor]:
        """Gather the kept visual tokens and the text in sequence order.

        Returns:
            Embeddings (P, D), the rows' lengths, and each token's position in the unpruned sequence (P,).
        """
        if masks.tokens.shape != encoding.visual_positions_BN.shape:
            raise InputError(
                f"the masks are for {tuple(masks.tokens.shape)} (queries, visual tokens); "
                f"the encoding has {tuple(encoding.visual_positions_BN.shape)}"
            )
        x_BSD = torch.cat([encoding.visual_BND, encoding.text_BTD], dim=1)
        keep_BS = torch.cat([masks.tokens, encoding.text_valid_BT], dim=1)
        positions_BS = torch.cat([encoding.visual_positions_BN, encoding.text_positions_BT], dim=1)
        order_BS = positions_BS.masked_fill(~keep_BS, torch.iinfo(torch.long).max).argsort(dim=1)
        ragged = Ragged(keep_BS.sum(1).cpu(), x_BSD.device)
        base_B = torch.arange(len(x_BSD), device=x_BSD.device) * x_BSD.shape[1]
        index_P = (order_BS + base_B[:, None])[ragged.valid_within(x_BSD.shape[1])]
        return x_BSD.flatten(0, 1)[index_P], ragged, positions_BS.flatten()[index_P]

    def prefill(self, encoding: Encoding, masks: Masks, cache: bool = False) -> tuple[Tensor, KVCache | None]:
        """Logits of the first answer token (B, V) under each row's plan; differentiable."""
        x_PD, ragged, positions_P = self.pack(encoding, masks)
        hidden_PD, kv = self.decoder.prefill(x_PD, ragged, positions_P, masks, cache)
        return self.model.lm_head(hidden_PD[ragged.last]), kv

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
        """
        reference_ids = None if references is None else [self.answer_ids(reference) for reference in references]
        longest = max((len(ids) for ids in reference_ids or []), default=0)
        logits_BV, kv = self.prefill(encoding, masks, cache=max_new_tokens > 1 or longest > 1)
        likelihood = None
        if reference_ids is not None:
            likelihood = self._score(logits_BV, reference_ids, encoding, kv)
        tokens = self._generate(logits_BV, max_new_tokens, encoding, kv)
        return Answers([self._decode_ids(tuple(ids)) for ids in tokens], tokens, likelihood)

    def log_likelihood(self, encoding: Encoding, masks: Masks, answers: Sequence[str]) -> Tensor:
        """Log-probability of each row's answer text under its plan, (B,) float32 (summed over its tokens)."""
        result = self.answer(encoding, masks, max_new_tokens=1, references=answers).log_likelihood
        assert result is not None
        return result

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
            steps.append(self._extend(ids_Bt[:, :-1], encoding.lengths, kv.fork()))
        log_probs = torch.cat(steps, dim=1).float().log_softmax(-1).gather(2, ids_Bt[..., None])[..., 0]
        within = torch.arange(ids_Bt.shape[1], device=counts.device) < counts[:, None]
        return (log_probs * within).sum(1)

    def _extend(self, ids_Bt: Tensor, positions_B: Tensor, kv: KVCache) -> Tensor:
        """Logits (B, t, V) after t more tokens a row, the first at position ``positions_B``."""
        steps = torch.arange(ids_Bt.shape[1], device=ids_Bt.device)
        x_BtD = self.decoder.model.embed_tokens(ids_Bt)
        return self.model.lm_head(self.decoder.extend(x_BtD, positions_B[:, None] + steps, kv))

    def _generate(
        self, logits_BV: Tensor, max_new_tokens: int, encoding: Encoding, kv: KVCache | None
    ) -> list[list[int]]:
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
            if not any(open_rows) or step + 1 == max_new_tokens:
                break
            assert kv is not None
            logits_BV = self._extend(next_B[:, None], encoding.lengths + step, kv)[:, 0]
        return answers

    # Cost

    def cost(
        self, masks: Masks, text_tokens: Tensor, controller: int | Tensor = 0, new_tokens: int | Tensor | None = None
    ) -> Cost:
        """FLOPs of B plans, priced at the expected answer length unless ``new_tokens`` says what was spent.

        Args:
            masks: B plans.
            text_tokens: (B,) text tokens of each prompt.
            controller: FLOPs of the controller that chose each plan, one number or (B,).
            new_tokens: answer tokens, one for all rows or (B,).
        """
        shape = self.decoder.shape
        like = text_tokens.long()
        answer = self.expected_answer_tokens if new_tokens is None else new_tokens
        return Cost(
            vision=torch.full_like(like, self.vision_flops),
            projector=torch.full_like(like, self.projector_flops),
            controller=torch.zeros_like(like) + controller,
            prefill=shape.prefill(masks, like),
            decode=shape.decode(masks, like, answer),
        )

    def full_llm_flops(self, text_tokens: Tensor) -> Tensor:
        """(B,) FLOPs of the full plan's prefill and decode: what a budget of 1 is a share of."""
        return self.cost(self.layout.full(len(text_tokens), text_tokens.device), text_tokens).llm


def _lay_out(before: list[int], after: list[int], tokens: int, width: int) -> tuple[list[int], list[int], list[int]]:
    """Ids, sequence places and validity of a prompt's text around ``tokens`` visual tokens, padded to ``width``."""
    count = len(before) + len(after)
    places = [*range(len(before)), *range(len(before) + tokens, count + tokens)]
    padding = [0] * (width - count)
    return before + after + padding, places + padding, [1] * count + padding
