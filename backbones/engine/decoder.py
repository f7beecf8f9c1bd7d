"""A Llama-style decoder executed under a plan: what the plan removes is not computed.

Dropped visual tokens are absent from the packed batch; those that leave at a stage go when its layer is reached, and
the layers before keep their keys and values. A dropped layer is not entered by its rows. Dropped head
slots are sliced out of the q, k, v and o projections, and their MLP slices out of gate, up and down.

Rows with different plans run together. Within a layer, the rows that keep it are covered by *blocks*, each a set
of rows times a set of head slots, such that every kept (row, slot) pair lies in exactly one block. There are two
ways to cut blocks: one for every distinct head pattern (rows once, weights sliced), or one for every pattern within a
key-value group (mostly views of the weights, rows repeated). The one with fewer blocks is taken.

Shape legend: B rows, P packed tokens, S longest row, D hidden width, L layers, H head slots, W projection columns,
R rotary position components, t new tokens.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from maskgym.backbones.engine.attention import attend_to_cache, attend_within_rows, check_kernel, rotate, to_heads
from maskgym.backbones.engine.blocks import Block, LayerPlan, plan_layers
from maskgym.backbones.engine.frame import Frame
from maskgym.backbones.engine.kv_cache import CachedBlock, KVCache
from maskgym.backbones.engine.packed import Packed
from maskgym.backbones.engine.ragged import Ragged
from maskgym.backbones.engine.sliced_linear import sliced_inputs, sliced_outputs
from maskgym.backbones.engine.staging import Listener, Staging
from maskgym.backbones.engine.token_scores import Heard
from maskgym.backbones.plans.cost import DecoderShape
from maskgym.backbones.plans.masks import Masks
from maskgym.common.errors import InputError

WIDTHS = ("heads+mlp", "heads")


class MaskedDecoder:
    """Executes plans on the layers of a Hugging Face Llama-style model, whose weights it uses in place.

    Args:
        language_model: the decoder body (``layers``, ``norm``, ``rotary_emb``, ``embed_tokens``).
        slots: H, head slots per layer; the query heads are cut into H equal groups. Several slots may share a
            key-value head, which is dropped when all of them are.
        width: ``"heads+mlp"`` (a slot takes its slice of the MLP with it) or ``"heads"``.
        attention: ``"auto"``, ``"sdpa"`` or ``"flash"``; auto takes FlashAttention-2 where it is installed and can run.

    Raises:
        InputError: a number of slots that neither divides the key-value heads nor cuts each of their groups of query
            heads evenly.
    """

    def __init__(
        self,
        language_model: nn.Module,
        lm_head: nn.Linear,
        slots: int,
        width: str = "heads+mlp",
        attention: str = "auto",
    ):
        self.model: Any = language_model
        self.lm_head = lm_head
        self.width, self.attention = width, check_kernel(attention)
        config: Any = self.model.config
        heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
        if slots < 1 or heads % slots or (kv_heads % slots and slots % kv_heads):
            raise InputError(
                f"{slots} head slots do not fit {heads} query heads on {kv_heads} key-value heads; use a divisor of "
                f"{kv_heads}, or a multiple of it that divides {heads}"
            )
        if width not in WIDTHS:
            raise InputError(f"width is {width!r}; it must be one of {', '.join(map(repr, WIDTHS))}")
        self.slots = slots
        self.head_width = getattr(config, "head_dim", None) or config.hidden_size // heads
        self.groups = min(slots, kv_heads)
        self.slots_per_group = slots // self.groups
        self.query_heads, self.kv_heads = heads // slots, kv_heads // self.groups  # per slot, per group
        cuts = [config.intermediate_size * slot // slots for slot in range(slots + 1)]
        self.mlp_cuts = list(pairwise(cuts))

    @property
    def shape(self) -> DecoderShape:
        """The sizes that the cost model needs."""
        config = self.model.config
        return DecoderShape(
            hidden=config.hidden_size,
            vocab=self.lm_head.out_features,
            query_width=(self.query_heads * self.head_width,) * self.slots,
            key_width=(self.kv_heads * self.head_width,) * self.groups,
            slots_per_group=self.slots_per_group,
            mlp_width=tuple(stop - start for start, stop in self.mlp_cuts),
            mlp_follows_heads=self.width == "heads+mlp",
            head_width=self.head_width,
        )

    def run(self, tokens: Packed, masks: Masks, cache: bool = False) -> tuple[Packed, KVCache | None, Masks]:
        """Run a packed batch of prompts under one plan a row.

        Args:
            tokens: those that the plans keep before the first layer.
            masks: B plans; their token part has been applied to ``tokens`` already, their stages are applied here.
            cache: whether to keep keys and values for ``extend``.

        Returns:
            What is left of the tokens, with their final hidden states, normalised; the cache if asked for; and the
            plans that were executed, which a decision on the way may have changed.
        """
        plans, kv = self._begin(masks, cache)
        staging = Staging(masks, partial(self._project_ahead, plans))
        first, frame = self._frames(tokens)
        for number in range(len(plans)):
            if masks.midway is not None and masks.midway.layer == number:
                state_BD = tokens.x_PD[tokens.ragged.last]
                heads_BLH, layers_BL = masks.midway.decide(state_BD, masks.heads, masks.layers)
                masks = replace(masks, heads=heads_BLH, layers=layers_BL)
                plans[number:] = self._plan(masks)[number:]
                staging.replan(masks)
            left = staging.enter(number, tokens)
            if left is not tokens:
                tokens, (first, frame) = left, self._frames(left)
            where = first if number == 0 else frame
            tokens = replace(
                tokens, x_PD=self._layer(number, plans[number], tokens.x_PD, where, kv, staging.listener(number))
            )
        return replace(tokens, x_PD=self.model.norm(tokens.x_PD)), kv, masks

    def extend(self, x_BtD: Tensor, rope_BtR: Tensor, cache: KVCache) -> Tensor:
        """Run t further tokens a row against the cache, which grows by them.

        Returns:
            Final hidden states (B, t, D), normalised.
        """
        rows, t = x_BtD.shape[:2]
        x_PD = x_BtD.flatten(0, 1)
        frame = Frame(Ragged(torch.full((rows,), t), x_PD.device), *self.rope(x_PD, rope_BtR.flatten(0, 1)))
        return self._through(x_PD, frame, cache.plans, cache).unflatten(0, (rows, t))

    def _begin(self, masks: Masks, cache: bool) -> tuple[list[LayerPlan], KVCache | None]:
        plans = self._plan(masks)
        return plans, KVCache(plans, [[] for _ in plans]) if cache else None

    def _plan(self, masks: Masks) -> list[LayerPlan]:
        return plan_layers(masks, self.slots_per_group, self.width == "heads+mlp")

    def _through(self, x_PD: Tensor, frame: Frame, plans: list[LayerPlan], cache: KVCache | None) -> Tensor:
        for number, plan in enumerate(plans):
            x_PD = self._layer(number, plan, x_PD, frame, cache)
        return self.model.norm(x_PD)

    def _layer(
        self,
        number: int,
        plan: LayerPlan,
        x_PD: Tensor,
        frame: Frame,
        cache: KVCache | None,
        listener: Listener | None = None,
    ) -> Tensor:
        """One layer, entered by the rows that keep it."""
        if not (plan.attention or plan.mlp):
            return x_PD
        layer = self.model.layers[number]
        cached = None if cache is None else cache.blocks[number]
        if plan.rows is None:
            x_PD = self._attend(layer, plan.attention, x_PD, frame, cached, listener)
            return self._feed_forward(layer, plan.mlp, x_PD, frame.ragged)
        part, index = frame.select(plan.rows)
        x = self._attend(layer, plan.attention, x_PD[index], part, cached, listener)
        return x_PD.index_copy(0, index, self._feed_forward(layer, plan.mlp, x, part.ragged))

    def _attend(
        self,
        layer: Any,
        blocks: list[Block],
        x_PD: Tensor,
        frame: Frame,
        cached: list[CachedBlock] | None,
        listener: Listener | None,
    ) -> Tensor:
        """The attention part of a layer. ``cached`` is empty at the prefill, and filled by it."""
        if not blocks:
            return x_PD
        normed_PD = layer.input_layernorm(x_PD)
        filling = cached if cached is not None and not cached else None
        scale = layer.self_attn.scaling
        updates = []
        for number, block in enumerate(blocks):
            part, index = (frame, None) if block.rows is None else frame.select(block.rows)
            h = normed_PD if index is None else normed_PD[index]
            q, k, v = self._project(layer.self_attn, block.slots, h, part.cos_PW, part.sin_PW)
            if cached is not None and filling is None:
                q, k, v = (to_heads(x, part.ragged) for x in (q, k, v))
                k, v, mask = cached[number].append(k, v)
                out = attend_to_cache(q, self._share(k, block.slots), self._share(v, block.slots), mask, scale)
                out_PW = out.flatten(0, 1).flatten(1)
            else:
                if filling is not None:
                    filling.append(CachedBlock(to_heads(k, part.ragged), to_heads(v, part.ragged), *part.cached))
                k, v = self._share(k, block.slots), self._share(v, block.slots)
                if listener is not None:
                    listener(part, q, k, scale)
                out_PW = attend_within_rows(q, k, v, part.ragged, scale, self.attention, part.mask).flatten(1)
            columns = self._columns(block.slots, self.query_heads)
            updates.append((index, sliced_inputs(layer.self_attn.o_proj, out_PW, columns)))
        return _add_updates(x_PD, updates)

    def _project(
        self, attention: Any, slots: tuple[int, ...], h_PD: Tensor, cos_PW: Tensor, sin_PW: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Queries of some slots, keys and values of their groups, each (P, heads, head width)."""
        groups = self._groups_of(slots)
        q = self._heads(attention.q_proj, h_PD, slots, self.query_heads)
        k, v = (self._heads(linear, h_PD, groups, self.kv_heads) for linear in (attention.k_proj, attention.v_proj))
        return rotate(q, cos_PW, sin_PW), rotate(k, cos_PW, sin_PW), v

    def _heads(self, linear: Any, h_PD: Tensor, units: tuple[int, ...], heads: int) -> Tensor:
        """Projections of slots or groups that have ``heads`` heads each, (P, heads, head width)."""
        return sliced_outputs(linear, h_PD, self._columns(units, heads)).unflatten(-1, (-1, self.head_width))

    def _project_ahead(
        self, plans: list[LayerPlan], tokens: Packed, asking_P: Tensor, layer_B: Tensor, there_B: Tensor
    ) -> list[Heard]:
        """Queries of the asking tokens and keys of all, in the layer that each row runs next, if any."""
        heard = []
        for number in layer_B[there_B].unique().tolist():
            layer, mine = self.model.layers[number], ((layer_B == number) & there_B).cpu()
            for block in plans[number].attention:
                rows = plans[number].rows_of(block, len(mine))
                if not bool(mine[rows].any()):
                    continue
                part, index = tokens.ragged.select(rows[mine[rows]])
                h, asks_P = layer.input_layernorm(tokens.x_PD[index]), asking_P[index]
                cos, sin = self.rope(h, tokens.rope_PR[index])
                q = self._heads(layer.self_attn.q_proj, h[asks_P], block.slots, self.query_heads)
                k = self._heads(layer.self_attn.k_proj, h, self._groups_of(block.slots), self.kv_heads)
                q, k = rotate(q, cos[asks_P], sin[asks_P]), self._share(rotate(k, cos, sin), block.slots)
                k = k.repeat_interleave(q.shape[1] // k.shape[1], dim=1)
                heard.append(Heard(number, part, tokens.ids_P[index], asks_P, q, k, layer.self_attn.scaling))
        return heard

    def _columns(self, units: tuple[int, ...], heads: int) -> list[tuple[int, int]]:
        """Projection columns of slots or groups that have ``heads`` heads each."""
        width = heads * self.head_width
        return [(unit * width, (unit + 1) * width) for unit in units]

    def _groups_of(self, slots: tuple[int, ...]) -> tuple[int, ...]:
        return tuple(sorted({slot // self.slots_per_group for slot in slots}))

    def _share(self, x: Tensor, slots: tuple[int, ...]) -> Tensor:
        """Keys or values (…, KV heads, …) as these slots' query heads need them; the heads are the second axis.

        Where every group serves equally many slots, attention itself repeats them; else they are repeated here.
        """
        groups = self._groups_of(slots)
        served = [sum(slot // self.slots_per_group == group for slot in slots) for group in groups]
        if len(set(served)) == 1:
            return x
        index = [groups.index(slot // self.slots_per_group) for slot in slots for _ in range(self.query_heads)]
        return x[:, index]

    def _feed_forward(self, layer: Any, blocks: list[Block], x_PD: Tensor, ragged: Ragged) -> Tensor:
        if not blocks:
            return x_PD
        mlp = layer.mlp
        normed_PD = layer.post_attention_layernorm(x_PD)
        updates = []
        for block in blocks:
            index = None if block.rows is None else ragged.select(block.rows)[1]
            h = normed_PD if index is None else normed_PD[index]
            columns = [self.mlp_cuts[slot] for slot in block.slots]
            inner = mlp.act_fn(sliced_outputs(mlp.gate_proj, h, columns)) * sliced_outputs(mlp.up_proj, h, columns)
            updates.append((index, sliced_inputs(mlp.down_proj, inner, columns)))
        return _add_updates(x_PD, updates)

    def rope(self, x_PD: Tensor, rope_PR: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines and sines (P, head width), from the model's own rotary module, so every kind that it supports is
        right here too: positions go in as (1, P), or as (3, 1, P) for M-RoPE."""
        positions = rope_PR.T if rope_PR.shape[1] == 1 else rope_PR.T[:, None]
        cos, sin = self.model.rotary_emb(x_PD[None], positions)
        return cos[0], sin[0]

    def _frames(self, tokens: Packed) -> tuple[Frame, Frame]:
        """Where the tokens stand, for the first layer and for all others."""
        cos_PW, sin_PW = self.rope(tokens.x_PD, tokens.rope_PR)
        frame = Frame(tokens.ragged, cos_PW, sin_PW, tokens.ids_P)
        if tokens.calibration is None:
            return frame, frame
        first, others = tokens.calibration.biases(cos_PW, sin_PW, tokens.ragged)
        return replace(frame, bias=first), replace(frame, bias=others)


def _add_updates(x_PD: Tensor, updates: list[tuple[Tensor | None, Tensor]]) -> Tensor:
    """Add each block's output to its tokens of the residual stream."""
    if len(updates) == 1 and updates[0][0] is None:
        return x_PD + updates[0][1]
    total_PD = torch.zeros_like(x_PD)
    for index, update in updates:
        if index is None:
            total_PD += update
        else:
            total_PD.index_add_(0, index, update.to(x_PD.dtype))  # under autocast the stream is wider
    return x_PD + total_PD
