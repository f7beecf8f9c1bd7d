"""The slow reference: one row at a time, everything computed, what the plan drops multiplied by zero or masked out."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb, repeat_kv

from backbones import Backbone, Encoding, Masks


def masked_logits(backbone: Backbone, encoding: Encoding, masks: Masks, row: int) -> Tensor:
    """Logits (V,) after the prompt of one row, by masking alone."""
    model, decoder = backbone.decoder.model, backbone.decoder
    x, keep, positions = _sequence(encoding, masks, row)
    length = x.shape[1]
    visible = torch.ones(length, length).tril().bool() & keep[None]
    bias = torch.zeros(length, length).masked_fill(~visible, -torch.inf)
    bias[~keep] = 0.0  # a dropped token's own row is never used; keep its softmax finite
    rope = model.rotary_emb(x, positions)
    for number, layer in enumerate(model.layers):
        slots = masks.heads[row, number].float()
        update = _attention(layer, x, rope, bias, slots.repeat_interleave(decoder.query_heads * decoder.head_width))
        runs = masks.layers[row, number] & (slots.any() if decoder.width == "heads+mlp" else torch.tensor(True))
        after = x + update
        inner = layer.mlp.gate_proj(layer.post_attention_layernorm(after))
        inner = layer.mlp.act_fn(inner) * layer.mlp.up_proj(layer.post_attention_layernorm(after))
        if decoder.width == "heads+mlp":
            widths = torch.tensor([stop - start for start, stop in decoder.mlp_cuts])
            inner = inner * slots.repeat_interleave(widths)
        x = torch.where(runs, after + layer.mlp.down_proj(inner), x)
    return backbone.model.lm_head(model.norm(x))[0, -1]


def _attention(layer, x: Tensor, rope: tuple[Tensor, Tensor], bias: Tensor, slots: Tensor) -> Tensor:
    attention = layer.self_attn
    h = layer.input_layernorm(x)
    q, k, v = (
        projection(h).unflatten(-1, (-1, attention.head_dim)).transpose(1, 2)
        for projection in (attention.q_proj, attention.k_proj, attention.v_proj)
    )
    q, k = apply_rotary_pos_emb(q, k, *rope)
    k, v = repeat_kv(k, attention.num_key_value_groups), repeat_kv(v, attention.num_key_value_groups)
    weights = (q @ k.transpose(2, 3) * attention.scaling + bias).softmax(-1)
    return attention.o_proj((weights @ v).transpose(1, 2).flatten(2) * slots)


def _sequence(encoding: Encoding, masks: Masks, row: int) -> tuple[Tensor, Tensor, Tensor]:
    """The unpruned sequence (1, S, D), which of its tokens are kept (S,), and its rotary positions as the model takes
    them, (1, S) or (3, 1, S)."""
    parts = []
    for side in ("visual", "text"):
        letter = "N" if side == "visual" else "T"
        valid = getattr(encoding, f"{side}_valid_B{letter}")[row]
        places = getattr(encoding, f"{side}_places_B{letter}")[row][valid]
        rope = getattr(encoding, f"{side}_rope_B{letter}R")[row][valid]
        x = getattr(encoding, f"{side}_B{letter}D")[row][valid]
        kept = masks.tokens[row][valid] if side == "visual" else torch.ones(len(places), dtype=torch.bool)
        parts.append((places, x, kept, rope))
    places, x, kept, rope = (torch.cat(column) for column in zip(*parts, strict=True))
    order = places.argsort()
    assert torch.equal(places[order], torch.arange(len(places))), "the places of a prompt must be 0, 1, 2, ..."
    rope = rope[order]
    return x[order][None], kept[order], rope.T if rope.shape[1] == 1 else rope.T[:, None]
