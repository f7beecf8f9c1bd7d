"""A Llama-style decoder executed under a plan: what the plan removes is not computed.

Dropped visual tokens are absent from the packed batch. A dropped layer is not entered by its rows. Dropped head
slots are sliced out of the q, k, v and o projections, and their MLP slices out of gate, up and down.

Rows with different plans run together. Within a layer, the rows that keep it are covered by *blocks*, each a set
of rows times a set of head slots, such that every kept (row, slot) pair lies in exactly one block. There are two
ways to cut blocks: one for every distinct head pattern (rows once, weights sliced), or one for every slot (weights
as views, rows repeated). The one with fewer blocks is taken, so a layer never takes more than H blocks.

Shape legend: B rows, P packed tokens, S longest row, D hidden width, L layers, H head slots, W projection columns.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from backbones.cost import DecoderShape
from backbones.errors import InputError
from backbones.masks import Masks
from backbones.ragged import Ragged

WIDTHS = ("heads+mlp", "heads")


@dataclass(frozen=True)
class Block:
    """Rows that are computed together with the same head slots.

    Attributes:
        rows: (b,) row numbers among the layer's rows, on the CPU; None = all of them.
        slots: the head slots computed.
    """

    rows: Tensor | None
    slots: tuple[int, ...]


@dataclass(frozen=True)
class LayerPlan:
    """How one layer runs for a batch.

    Attributes:
        rows: (b,) rows of the batch that enter the layer, on the CPU; None = all of them.
        attention: blocks of the attention part.
        mlp: blocks of the MLP part.
    """

    rows: Tensor | None
    attention: list[Block]
    mlp: list[Block]


@dataclass
class KVCache:
    """Keys and values of a prefilled batch: for each layer and attention block, what its rows and slots wrote.

    Attributes:
        plans: the layer plans of the prefill, re-used by every later step.
        lengths: (B,) tokens that each row has cached so far, on the CPU.
        entries: [layer][block] -> (keys, values), each (b, KV heads, S, head width), rows padded at the end.
        valid: [layer][block] -> (b, S) which cached places hold a token.
    """

    plans: list[LayerPlan]
    lengths: Tensor
    entries: list[list[tuple[Tensor, Tensor]]] = field(default_factory=list)
    valid: list[list[Tensor]] = field(default_factory=list)

    def fork(self) -> KVCache:
        """A cache that continues from here without changing this one."""
        return KVCache(self.plans, self.lengths, self.entries, self.valid)


class MaskedDecoder:
    """Executes plans on the layers of a Hugging Face Llama-style model, whose weights it uses in place.

    Args:
        language_model: the decoder body (``layers``, ``norm``, ``rotary_emb``, ``embed_tokens``).
        slots: H, head slots per layer; the query heads are cut into H equal groups.
        width: ``"heads+mlp"`` (a slot takes its slice of the MLP with it) or ``"heads"``.

    Raises:
        InputError: a number of slots that would split a group of query heads sharing one key-value head.
    """

    def __init__(self, language_model: nn.Module, lm_head: nn.Linear, slots: int, width: str = "heads+mlp"):
        self.model: Any = language_model
        self.lm_head = lm_head
        self.width = width
        config: Any = self.model.config
        heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
        if slots < 1 or kv_heads % slots:
            raise InputError(f"{slots} head slots do not divide the {kv_heads} key-value heads; use a divisor of them")
        if width not in WIDTHS:
            raise InputError(f"width is {width!r}; it must be one of {', '.join(map(repr, WIDTHS))}")
        self.slots = slots
        self.head_width = getattr(config, "head_dim", None) or config.hidden_size // heads
        self.query_heads, self.kv_heads = heads // slots, kv_heads // slots  # per slot
        cuts = [config.intermediate_size * slot // slots for slot in range(slots + 1)]
        self.mlp_cuts = list(pairwise(cuts))
        self._rope: tuple[Tensor, Tensor] | None = None

    @property
    def shape(self) -> DecoderShape:
        """The sizes that the cost model needs."""
        config = self.model.config
        return DecoderShape(
            hidden=config.hidden_size,
            vocab=self.lm_head.out_features,
            query_width=(self.query_heads * self.head_width,) * self.slots,
            key_width=(self.kv_heads * self.head_width,) * self.slots,
            mlp_width=tuple(stop - start for start, stop in self.mlp_cuts),
            mlp_follows_heads=self.width == "heads+mlp",
        )

    def prefill(
        self, x_PD: Tensor, ragged: Ragged, positions_P: Tensor, masks: Masks, cache: bool = False
    ) -> tuple[Tensor, KVCache | None]:
        """Run a packed batch of prompts under one plan a row.

        Args:
            x_PD: input embeddings of the tokens that the plans keep, row after row.
            ragged: the rows' lengths.
            positions_P: position of each token in its unpruned sequence.
            masks: B plans; their token part has been applied to ``x_PD`` already.
            cache: whether to keep keys and values for ``extend``.

        Returns:
            Final hidden states (P, D), normalised, and the cache if asked for.
        """
        plans = self._plan_layers(masks)
        kv = KVCache(plans, ragged.lengths) if cache else None
        return self._run(x_PD, ragged, positions_P, plans, None, kv), kv

    def extend(self, x_BtD: Tensor, positions_Bt: Tensor, cache: KVCache) -> Tensor:
        """Run t further tokens a row against the cache, which grows by them.

        Returns:
            Final hidden states (B, t, D), normalised.
        """
        rows, t = x_BtD.shape[:2]
        ragged = Ragged(torch.full((rows,), t), x_BtD.device)
        past = cache.fork()
        cache.entries, cache.valid, cache.lengths = [], [], cache.lengths + t
        out_PD = self._run(x_BtD.flatten(0, 1), ragged, positions_Bt.flatten(), cache.plans, past, cache)
        return out_PD.unflatten(0, (rows, t))

    def _run(
        self,
        x_PD: Tensor,
        ragged: Ragged,
        positions_P: Tensor,
        plans: list[LayerPlan],
        past: KVCache | None,
        kv: KVCache | None,
    ) -> Tensor:
        cos_PW, sin_PW = (table[positions_P] for table in self._rope_tables(int(positions_P.max()) + 1, x_PD))
        for number, (layer, plan) in enumerate(zip(self.model.layers, plans, strict=True)):
            if kv is not None:
                kv.entries.append([])
                kv.valid.append([])
            if not (plan.attention or plan.mlp):
                continue
            if plan.rows is None:
                part, index, x = ragged, None, x_PD
                rope = (cos_PW, sin_PW)
            else:
                part, index = ragged.select(plan.rows)
                x, rope = x_PD[index], (cos_PW[index], sin_PW[index])
            x = self._attend(layer, plan.attention, x, part, rope, None if past is None else (past, number), kv)
            x = self._feed_forward(layer, plan.mlp, x, part)
            x_PD = x if index is None else x_PD.index_copy(0, index, x)
        return self.model.norm(x_PD)

    def _attend(
        self,
        layer: Any,
        blocks: list[Block],
        x_PD: Tensor,
        ragged: Ragged,
        rope: tuple[Tensor, Tensor],
        past: tuple[KVCache, int] | None,
        kv: KVCache | None,
    ) -> Tensor:
        if not blocks:
            return x_PD
        attention = layer.self_attn
        normed_PD = layer.input_layernorm(x_PD)
        updates = []
        for number, block in enumerate(blocks):
            part, index = (ragged, None) if block.rows is None else ragged.select(block.rows)
            h, cos, sin = (v if index is None else v[index] for v in (normed_PD, *rope))
            columns, kv_columns = (
                [(slot * n * self.head_width, (slot + 1) * n * self.head_width) for slot in block.slots]
                for n in (self.query_heads, self.kv_heads)
            )
            q = part.pad(self._rotate(_linear_rows(attention.q_proj, h, columns), cos, sin))
            k = part.pad(self._rotate(_linear_rows(attention.k_proj, h, kv_columns), cos, sin))
            v = part.pad(_linear_rows(attention.v_proj, h, kv_columns))
            q, k, v = (x.unflatten(-1, (-1, self.head_width)).transpose(1, 2) for x in (q, k, v))
            valid = part.valid
            mask = None
            if past is not None:
                k, v, valid, mask = _join_past(past[0].entries[past[1]][number], past[0].valid[past[1]][number], k, v)
            if kv is not None:
                kv.entries[-1].append((k, v))
                kv.valid[-1].append(valid)
            # Rows are padded at the end, so under the causal rule no token sees a padded place.
            out = F.scaled_dot_product_attention(
                q, k, v, mask, is_causal=mask is None, scale=attention.scaling, enable_gqa=q.shape[1] != k.shape[1]
            )
            out = part.unpad(out.transpose(1, 2).flatten(2))
            updates.append((index, _linear_columns(attention.o_proj, out, columns)))
        return _add_updates(x_PD, updates)

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
            inner = mlp.act_fn(_linear_rows(mlp.gate_proj, h, columns)) * _linear_rows(mlp.up_proj, h, columns)
            updates.append((index, _linear_columns(mlp.down_proj, inner, columns)))
        return _add_updates(x_PD, updates)

    def _plan_layers(self, masks: Masks) -> list[LayerPlan]:
        heads_BLH, layers_BL = masks.heads.cpu(), masks.layers.cpu()
        every_slot = tuple(range(self.slots))
        plans = []
        for number in range(layers_BL.shape[1]):
            heads_BH = heads_BLH[:, number] & layers_BL[:, number, None]
            runs_B = heads_BH.any(1) if self.width == "heads+mlp" else layers_BL[:, number]
            rows = None if bool(runs_B.all()) else runs_B.nonzero()[:, 0]
            if rows is not None:
                heads_BH = heads_BH[rows]
            attention = cut_blocks(heads_BH)
            whole = [Block(None, every_slot)] if len(heads_BH) else []
            mlp = attention if self.width == "heads+mlp" else whole
            plans.append(LayerPlan(rows, attention, mlp))
        return plans

    def _rope_tables(self, length: int, like: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines and sines by position, (positions, head width), computed once for as far as was needed."""
        if self._rope is None or self._rope[0].shape[0] < length:
            count = max(length, 256)
            # The model's own rotary module, so every rope_type that it supports is right here too.
            cos, sin = self.model.rotary_emb(like, torch.arange(count, device=like.device)[None])
            self._rope = cos[0], sin[0]
        return self._rope

    def _rotate(self, x_PW: Tensor, cos_PW: Tensor, sin_PW: Tensor) -> Tensor:
        """Rotary embedding of packed heads, (P, heads * head width)."""
        x = x_PW.unflatten(-1, (-1, self.head_width))
        first, second = x.chunk(2, dim=-1)
        turned = torch.cat((-second, first), dim=-1)
        return (x * cos_PW[:, None] + turned * sin_PW[:, None]).flatten(1)


def cut_blocks(heads_BH: Tensor) -> list[Block]:
    """Cover every kept (row, slot) pair exactly once, by whichever cut has fewer blocks.

    Args:
        heads_BH: (B, H) kept slots of each row, on the CPU.
    """
    slots = heads_BH.shape[1]
    patterns, pattern_of_row = heads_BH.unique(dim=0, return_inverse=True)
    kept = [number for number, pattern in enumerate(patterns) if pattern.any()]
    if len(kept) <= slots:
        if len(patterns) == 1:
            pairs = [(None, patterns[number]) for number in kept]
        else:
            pairs = [((pattern_of_row == number).nonzero()[:, 0], patterns[number]) for number in kept]
        return [Block(rows, tuple(pattern.nonzero()[:, 0].tolist())) for rows, pattern in pairs]
    blocks = []
    for slot in range(slots):
        rows = heads_BH[:, slot].nonzero()[:, 0]
        if len(rows):
            blocks.append(Block(None if len(rows) == len(heads_BH) else rows, (slot,)))
    return blocks


def _linear_rows(linear: nn.Linear, x: Tensor, ranges: Sequence[tuple[int, int]]) -> Tensor:
    """Some output columns of a linear layer: its weight's rows in ``ranges`` (ascending, disjoint)."""
    bias = linear.bias
    if _adjacent(ranges):
        rows = slice(ranges[0][0], ranges[-1][1])
        return F.linear(x, linear.weight[rows], None if bias is None else bias[rows])
    weight = torch.cat([linear.weight[start:stop] for start, stop in ranges])
    return F.linear(x, weight, None if bias is None else torch.cat([bias[start:stop] for start, stop in ranges]))


def _linear_columns(linear: nn.Linear, x: Tensor, ranges: Sequence[tuple[int, int]]) -> Tensor:
    """A linear layer on inputs of which only ``ranges`` (ascending, disjoint) exist."""
    if linear.bias is not None:
        raise InputError("output projections with a bias are not supported: slots could not share it")
    if _adjacent(ranges):
        return F.linear(x, linear.weight[:, ranges[0][0] : ranges[-1][1]])
    return F.linear(x, torch.cat([linear.weight[:, start:stop] for start, stop in ranges], dim=1))


def _adjacent(ranges: Sequence[tuple[int, int]]) -> bool:
    return all(left[1] == right[0] for left, right in pairwise(ranges))


def _add_updates(x_PD: Tensor, updates: list[tuple[Tensor | None, Tensor]]) -> Tensor:
    """Add each block's output to its tokens of the residual stream."""
    if len(updates) == 1 and updates[0][0] is None:
        return x_PD + updates[0][1]
    total_PD = torch.zeros_like(x_PD)
    for index, update in updates:
        if index is None:
            total_PD += update
        else:
            total_PD.index_add_(0, index, update)
    return x_PD + total_PD


def _join_past(
    entry: tuple[Tensor, Tensor], valid: Tensor, k: Tensor, v: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Cached and new keys and values, which places are real (b, S+t), and the attention mask (b, 1, t, S+t)."""
    rows, t = k.shape[0], k.shape[2]
    new = torch.ones(rows, t, dtype=torch.bool, device=k.device)
    causal = torch.ones(t, t, dtype=torch.bool, device=k.device).tril().expand(rows, t, t)
    mask = torch.cat([valid[:, None].expand(rows, t, valid.shape[1]), causal], dim=2)
    keys, values = torch.cat([entry[0], k], dim=2), torch.cat([entry[1], v], dim=2)
    return keys, values, torch.cat([valid, new], dim=1), mask[:, None]
