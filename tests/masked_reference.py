"""The slow reference: one row at a time, everything computed, what the plan drops multiplied by zero or masked out."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb, repeat_kv

from maskgym.backbones import Backbone, Encoding, Masks
from maskgym.backbones.engine.arrange import arrange
from maskgym.backbones.plans.stages import Stage


@dataclass
class Sequence:
    """The unpruned sequence of one row: embeddings (1, S, D), rotary positions as the model takes them, which tokens
    are there (S,), their visual and text numbers (-1: of the other side), how many tokens each stands for."""

    x: Tensor
    positions: Tensor
    keep: Tensor
    visual: Tensor
    text: Tensor
    sizes: Tensor
    calibrated: bool


def masked_logits(backbone: Backbone, encoding: Encoding, masks: Masks, row: int) -> Tensor:
    """Logits (V,) after the prompt of one row, by masking alone."""
    model, decoder = backbone.decoder.model, backbone.decoder
    sequence = _sequence(encoding, masks, row)
    x, keep = sequence.x, sequence.keep
    rope = model.rotary_emb(x, sequence.positions)
    attended = None
    for number, layer in enumerate(model.layers):
        for stage in masks.stages:
            if stage.layer == number:
                here = stage.scorer is not None and stage.scorer.here
                ahead = _attended_next(backbone, masks, row, number, x, rope, keep) if here else None
                keep = _chosen(sequence, keep, stage, row, attended, ahead)
        slots = masks.heads[row, number].float()
        runs = masks.layers[row, number] & (slots.any() if decoder.width == "heads+mlp" else torch.tensor(True))
        columns = slots.repeat_interleave(decoder.query_heads * decoder.head_width)
        update, weights = _attention(layer, x, rope, _bias(sequence, keep, rope, first=number == 0), columns)
        if masks.layers[row, number] and slots.any():
            attended = _mean_over(weights, slots, decoder.query_heads)
        after = x + update
        inner = layer.mlp.gate_proj(layer.post_attention_layernorm(after))
        inner = layer.mlp.act_fn(inner) * layer.mlp.up_proj(layer.post_attention_layernorm(after))
        if decoder.width == "heads+mlp":
            widths = torch.tensor([stop - start for start, stop in decoder.mlp_cuts])
            inner = inner * slots.repeat_interleave(widths)
        x = torch.where(runs, after + layer.mlp.down_proj(inner), x)
    return backbone.model.lm_head(model.norm(x))[0, -1]


def _chosen(
    sequence: Sequence, keep: Tensor, stage: Stage, row: int, attended: Tensor | None, ahead: Tensor | None
) -> Tensor:
    """Which tokens are still there after a stage; the full attention matrices (S, S) are at hand."""
    present = keep & (sequence.visual >= 0)
    if int(stage.keep[row]) >= int(present.sum()):
        return keep
    if stage.scores is not None:
        scores = stage.scores[row][sequence.visual.clamp_min(0)]
    else:
        matrix = ahead if stage.scorer.here else attended
        last = torch.arange(len(keep)) == len(keep) - 1
        asks = {"last": last, "all": keep, "marked": last}[stage.scorer.who]
        if stage.scorer.who == "marked":
            asks = (sequence.text >= 0) & stage.marked[row][sequence.text.clamp_min(0)]
        scores = torch.zeros(len(keep)) if matrix is None else matrix[asks].sum(0)
    best = scores.masked_fill(~present, -torch.inf).argsort(descending=True, stable=True)[: int(stage.keep[row])]
    after = sequence.visual < 0
    after[best] = True
    return keep & after


def _attended_next(backbone, masks, row, number, x, rope, keep) -> Tensor | None:
    """Mean attention (S, S) of the next layer that the row attends in, on what has been computed so far."""
    decoder = backbone.decoder
    for ahead in range(number, len(decoder.model.layers)):
        slots = masks.heads[row, ahead].float()
        if masks.layers[row, ahead] and slots.any():
            causal = torch.ones(len(keep), len(keep)).tril().bool() & keep[None]
            bias = torch.zeros(causal.shape).masked_fill(~causal, -torch.inf)
            bias[~keep] = 0.0
            columns = slots.repeat_interleave(decoder.query_heads * decoder.head_width)
            weights = _attention(decoder.model.layers[ahead], x, rope, bias, columns)[1]
            return _mean_over(weights, slots, decoder.query_heads)
    return None


def _mean_over(weights: Tensor, slots: Tensor, query_heads: int) -> Tensor:
    return weights[0][slots.bool().repeat_interleave(query_heads)].mean(0)


def _bias(sequence: Sequence, keep: Tensor, rope: tuple[Tensor, Tensor], first: bool) -> Tensor:
    """(S, S) added to the logits: what is not there is masked; RESTORE's terms, by the paper's formula."""
    length = len(keep)
    visible = torch.ones(length, length).tril().bool() & keep[None]
    bias = torch.zeros(length, length)
    if sequence.calibrated:
        cos, sin = rope[0][0], rope[1][0]
        half = cos.shape[1] // 2  # the tables hold every frequency twice
        for query in range(length):
            for key in range(query + 1):
                turned = cos[query, :half] * cos[key, :half] + sin[query, :half] * sin[key, :half]
                bias[query, key] = torch.log(2 - turned.mean())
        sizes, visual = sequence.sizes.clone(), keep & (sequence.visual >= 0)
        if first:
            sizes[visual] = sequence.sizes[visual].mean()
        bias = bias + sizes.log()[None]
    bias = bias.masked_fill(~visible, -torch.inf)
    bias[~keep] = 0.0  # a dropped token's own row is never used; keep its softmax finite
    return bias


def _attention(layer, x: Tensor, rope: tuple[Tensor, Tensor], bias: Tensor, slots: Tensor) -> tuple[Tensor, Tensor]:
    attention = layer.self_attn
    h = layer.input_layernorm(x)
    q, k, v = (
        projection(h).unflatten(-1, (-1, attention.head_dim)).transpose(1, 2)
        for projection in (attention.q_proj, attention.k_proj, attention.v_proj)
    )
    q, k = apply_rotary_pos_emb(q, k, *rope)
    k, v = repeat_kv(k, attention.num_key_value_groups), repeat_kv(v, attention.num_key_value_groups)
    weights = (q @ k.transpose(2, 3) * attention.scaling + bias).softmax(-1)
    return attention.o_proj((weights @ v).transpose(1, 2).flatten(2) * slots), weights


def _sequence(encoding: Encoding, masks: Masks, row: int) -> Sequence:
    """One row in sequence order, laid out as its plan says."""
    arranged = arrange(encoding, masks)
    laid_out = arranged.encoding
    visual_there, text_there = encoding.visual_valid_BN[row], encoding.text_valid_BT[row]
    counts = int(visual_there.sum()), int(text_there.sum())
    calibrated = arranged.restored_B is not None and bool(arranged.restored_B[row])
    sizes = arranged.sizes_BN[row][visual_there] if calibrated else torch.ones(counts[0])
    places = torch.cat([laid_out.visual_places_BN[row][visual_there], laid_out.text_places_BT[row][text_there]])
    rope = torch.cat([laid_out.visual_rope_BNR[row][visual_there], laid_out.text_rope_BTR[row][text_there]])
    x = torch.cat([laid_out.visual_BND[row][visual_there], laid_out.text_BTD[row][text_there]])
    keep = torch.cat([masks.tokens[row][visual_there], torch.ones(counts[1], dtype=torch.bool)])
    order = places.argsort(stable=True)
    if masks.survivors is None:
        assert torch.equal(places[order], torch.arange(len(places))), "the places of a prompt must be 0, 1, 2, ..."
    visual = torch.cat([torch.arange(counts[0]), torch.full((counts[1],), -1)])
    text = torch.cat([torch.full((counts[0],), -1), torch.arange(counts[1])])
    rope = rope[order]
    return Sequence(
        x[order][None],
        rope.T if rope.shape[1] == 1 else rope.T[:, None],
        keep[order],
        visual[order],
        text[order],
        torch.cat([sizes, torch.ones(counts[1])])[order],
        calibrated,
    )
