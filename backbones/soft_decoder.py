"""The model under relaxed plans, through which gradients reach every decision.

Nothing is removed: the whole model runs, and gates in [0, 1] say how much of a part there is. With gates of exactly 0
and 1 the answer tokens' logits are those of the executed plan, and a dropped part still gets a gradient: what would
change if there were a little of it. Gates, and attention's weights, are float32 whatever the model's weights are; what
goes through these is rounded to their type first.

Shape legend: B rows, S places of the longest sequence, N visual tokens, D hidden width, L layers, H head slots, Q query
heads, W head width, G key-value groups, T answer tokens of all rows, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from maskgym.backbones.backbone import Backbone
from maskgym.backbones.encodings.encoding import Encoding
from maskgym.backbones.engine.attention import rotate
from maskgym.backbones.plans.masks import Masks

CEILING = 5.0
"""Attention logits of tokens that are hardly there count at most so much above the largest other: their exponential,
which is multiplied by next to nothing, must not overflow, and a dropped token that would draw all attention must not
drown the gradient."""


@dataclass(frozen=True)
class Gates:
    """Relaxed plans: numbers in [0, 1] in place of bits.

    Attributes:
        tokens: (B, N) visual tokens.
        heads: (B, L, H) head slots.
        layers: (B, L) decoder layers.
    """

    tokens: Tensor
    heads: Tensor
    layers: Tensor

    @classmethod
    def of(cls, masks: Masks, dtype: torch.dtype = torch.float32) -> Gates:
        """The gates of hard plans."""
        return cls(masks.tokens.to(dtype), masks.heads.to(dtype), masks.layers.to(dtype))

    @property
    def effective_heads(self) -> Tensor:
        """(B, L, H) how much of each head slot there is, its layer's gate included."""
        return self.heads * self.layers[..., None]


@dataclass(frozen=True)
class SoftMidway:
    """A decision on entering a layer, as ``maskgym.backbones.plans.midway`` has it, relaxed.

    Attributes:
        layer: the first that is decided on.
        choose: from the states (B, D) of the last tokens of the prompts to relaxed plans for all layers.
    """

    layer: int
    choose: Callable[[Tensor], Gates]


def soft_answer_logits(
    backbone: Backbone,
    encoding: Encoding,
    gates: Gates,
    answers: Sequence[list[int]],
    midway: SoftMidway | None = None,
) -> Tensor:
    """Logits (T, V) at the places that predict each answer's tokens and its end, row after row, in the
    gates' type where that is finer; differentiable.

    Args:
        backbone: runs the whole model.
        encoding: B prompts followed by their answers.
        gates: B relaxed plans.
        answers: ids of each row's answer, without an end token.
        midway: gives the plans from its layer on.
    """
    x_BSD, present_BS, cos_BSW, sin_BSW = _lay_out(backbone, encoding, gates)
    lengths = (encoding.visual_valid_BN.sum(1) + encoding.text_tokens).tolist()
    starts = [length - len(ids) - 1 for length, ids in zip(lengths, answers, strict=True)]
    for number, layer in enumerate(backbone.decoder.model.layers):
        if midway is not None and midway.layer == number:
            gates = midway.choose(x_BSD[range(len(starts)), starts])
        heads_BH = gates.effective_heads[:, number]
        x_BSD = x_BSD + _attend(backbone, layer, x_BSD, present_BS, (cos_BSW, sin_BSW), heads_BH)
        x_BSD = x_BSD + _feed_forward(backbone, layer, x_BSD, heads_BH, gates.layers[:, number])
    rows = [row for row, ids in enumerate(answers) for _ in range(len(ids) + 1)]
    places = [place for start, length in zip(starts, lengths, strict=True) for place in range(start, length)]
    logits_TV = backbone.model.lm_head(backbone.decoder.model.norm(x_BSD[rows, places]))
    return logits_TV.to(torch.promote_types(logits_TV.dtype, gates.tokens.dtype))


def soft_llm_flops(backbone: Backbone, encoding: Encoding, gates: Gates, controller: int | Tensor = 0) -> Tensor:
    """(B,) FLOPs of relaxed plans by the same cost model, differentiable; equal to it at gates of 0 and 1.

    Args:
        backbone: prices.
        encoding: B queries.
        gates: B relaxed plans.
        controller: FLOPs of the controller, one number or (B,).
    """
    shape = backbone.decoder.shape
    tokens_B = (gates.tokens.double() * encoding.visual_valid_BN).sum(1) + encoding.text_tokens
    double = Gates(gates.tokens.double(), gates.heads.double(), gates.layers.double())
    llm_B = shape.prefill(double, tokens_B) + shape.decode(double, tokens_B, encoding.expected_tokens)
    return llm_B + controller


def _lay_out(backbone: Backbone, encoding: Encoding, gates: Gates) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """All tokens in sequence order, padded at the end: embeddings, how much of each is there, cosines and sines."""
    valid_BS = torch.cat([encoding.visual_valid_BN, encoding.text_valid_BT], dim=1)
    places_BS = torch.cat([encoding.visual_places_BN, encoding.text_places_BT], dim=1)
    present_BS = torch.cat(
        [gates.tokens * encoding.visual_valid_BN, encoding.text_valid_BT.to(gates.tokens.dtype)], dim=1
    )
    order_BS = places_BS.masked_fill(~valid_BS, torch.iinfo(torch.long).max).argsort(dim=1)
    order_BS = order_BS[:, : int(valid_BS.sum(1).max())]
    x_BSD = torch.cat([encoding.visual_BND, encoding.text_BTD], dim=1)
    rope_BSR = torch.cat([encoding.visual_rope_BNR, encoding.text_rope_BTR], dim=1)
    x_BSD, rope_BSR = (x.gather(1, order_BS[..., None].expand(-1, -1, x.shape[2])) for x in (x_BSD, rope_BSR))
    cos_PW, sin_PW = backbone.decoder.rope(x_BSD.flatten(0, 1), rope_BSR.flatten(0, 1))
    cos_BSW, sin_BSW = (x.unflatten(0, order_BS.shape) for x in (cos_PW, sin_PW))
    return x_BSD, present_BS.gather(1, order_BS), cos_BSW, sin_BSW


def _attend(
    backbone: Backbone, layer: Any, x_BSD: Tensor, present_BS: Tensor, rope: tuple[Tensor, Tensor], heads_BH: Tensor
) -> Tensor:
    """What the attention part adds: every head's output times its slot's gate."""
    attention, normed_BSD = layer.self_attn, layer.input_layernorm(x_BSD)
    width = backbone.decoder.head_width
    q, k, v = (
        project(normed_BSD).unflatten(-1, (-1, width))
        for project in (attention.q_proj, attention.k_proj, attention.v_proj)
    )
    q, k = (rotate(x.flatten(0, 1), *(part.flatten(0, 1) for part in rope)).view_as(x) for x in (q, k))
    repeats = q.shape[2] // k.shape[2]
    q_BQSW, k_BQSW, v_BQSW = (
        x.transpose(1, 2) for x in (q, k.repeat_interleave(repeats, dim=2), v.repeat_interleave(repeats, dim=2))
    )
    weights_BQSS: Tensor = _GatedSoftmax.apply(q_BQSW * attention.scaling @ k_BQSW.transpose(2, 3), present_BS)
    out_BSQW = (weights_BQSS.to(v.dtype) @ v_BQSW).transpose(1, 2)
    gates_BQ = heads_BH.repeat_interleave(backbone.decoder.query_heads, dim=1)
    return attention.o_proj((out_BSQW * gates_BQ[:, None, :, None]).flatten(2).to(x_BSD.dtype))


class _GatedSoftmax(torch.autograd.Function):
    """Causal attention weights in which a key counts as much as it is there: p = g exp(s) over the sum of g exp(s).

    A key with gate 0 has weight 0, and its gate a gradient. Written out because a fifth of a training step's time went
    into passes over (B, Q, S, S) that autograd made and kept; with u = p / g, dg is the sum of u (dp - <dp, p>), and ds
    has g times its terms.
    """

    @staticmethod
    def forward(ctx: Any, logits_BQSS: Tensor, present_BS: Tensor) -> Tensor:
        causal_SS = torch.ones(logits_BQSS.shape[-2:], dtype=torch.bool, device=logits_BQSS.device).tril()
        log_present_B1SS = present_BS.log()[:, None, None].masked_fill(~causal_SS, -torch.inf)
        # A text token comes first in every prompt, so each place has a key that is there.
        largest_BQS1 = (logits_BQSS + log_present_B1SS).amax(-1, keepdim=True)
        u_BQSS = (logits_BQSS - largest_BQS1).clamp_max_(CEILING).exp_().mul_(causal_SS)
        weights_BQSS = u_BQSS * present_BS[:, None, None]
        total_BQS1 = weights_BQSS.sum(-1, keepdim=True)
        u_BQSS.div_(total_BQS1)
        weights_BQSS.div_(total_BQS1)
        ctx.save_for_backward(u_BQSS, weights_BQSS, present_BS)
        return weights_BQSS

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_BQSS: Tensor) -> tuple[Tensor, Tensor]:
        u_BQSS, weights_BQSS, present_BS = ctx.saved_tensors
        mean_BQS1 = (grad_BQSS * weights_BQSS).sum(-1, keepdim=True)
        slopes_BQSS = (grad_BQSS - mean_BQS1).mul_(u_BQSS)
        present_grad_BS = slopes_BQSS.sum((1, 2))
        # Keys at the ceiling have gates below exp(-CEILING), so what they get too much is little.
        return slopes_BQSS.mul_(present_BS[:, None, None]), present_grad_BS


def _feed_forward(backbone: Backbone, layer: Any, x_BSD: Tensor, heads_BH: Tensor, layer_B: Tensor) -> Tensor:
    """What the MLP part adds: its slices times their slots' gates, or all of it times its layer's."""
    mlp, normed_BSD = layer.mlp, layer.post_attention_layernorm(x_BSD)
    inner = mlp.act_fn(mlp.gate_proj(normed_BSD)) * mlp.up_proj(normed_BSD)
    if backbone.decoder.width == "heads":
        return (mlp.down_proj(inner) * layer_B[:, None, None]).to(x_BSD.dtype)
    widths = torch.tensor([stop - start for start, stop in backbone.decoder.mlp_cuts], device=inner.device)
    return mlp.down_proj((inner * heads_BH.repeat_interleave(widths, dim=1)[:, None]).to(x_BSD.dtype))
