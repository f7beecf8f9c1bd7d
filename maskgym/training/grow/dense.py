"""A Llama decoder with low-rank deltas of all layers at once, under plans that are gates.

Shape legend: B rows, S places, D hidden width, L layers, Q query heads, W head width, I columns of the MLP, R rotary
frequencies, V vocabulary, r rank, o and i a matrix' outputs and inputs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from maskgym.backbones.engine.attention import rotate
from maskgym.backbones.small.deltas import ATTENTION, MLP

MATRICES = {name: f"self_attn.{name}" for name in ATTENTION} | {name: f"mlp.{name}" for name in MLP}
"""The matrices of a layer that have deltas, by the names of the files of deltas."""


@dataclass(frozen=True)
class DenseGates:
    """What plans leave of the decoder, as numbers.

    Attributes:
        heads_BLQ: 1 for query heads that are there, 0 for others.
        columns_BLI: the same for the MLP's columns.
    """

    heads_BLQ: Tensor
    columns_BLI: Tensor


class DenseDecoder(nn.Module):
    """The layers of a Llama decoder, its matrices stacked: published ones, frozen, plus trained low-rank ones.

    Args:
        language_model: of Hugging Face, in float32; copied.
        rank: r of the deltas B A; B begins as zeros.
        seed: of A.
        compiled: whether a layer is compiled (``torch.compile``), for a GPU.
    """

    embedding_VD: Tensor
    rates_R: Tensor

    def __init__(self, language_model: Any, rank: int, seed: int = 0, compiled: bool = False):
        super().__init__()
        config, layers = language_model.config, language_model.layers
        self.q_heads, self.kv_heads = config.num_attention_heads, config.num_key_value_heads
        self.eps, self.intermediate = config.rms_norm_eps, config.intermediate_size
        generator = torch.Generator().manual_seed(seed)
        self.A, self.B = nn.ParameterDict(), nn.ParameterDict()
        for name, path in MATRICES.items():
            stack_Loi = torch.stack([layer.get_submodule(path).weight.detach().float() for layer in layers])
            count, out, into = stack_Loi.shape
            self.register_buffer(f"base_{name}", stack_Loi, persistent=False)
            self.A[name] = nn.Parameter(torch.randn(count, rank, into, generator=generator) * into**-0.5)
            self.B[name] = nn.Parameter(torch.zeros(count, out, rank))
        norms = [[layer.input_layernorm.weight, layer.post_attention_layernorm.weight] for layer in layers]
        self.norm_in = nn.Parameter(torch.stack([first.detach().float() for first, _ in norms]))
        self.norm_post = nn.Parameter(torch.stack([second.detach().float() for _, second in norms]))
        self.norm_final = nn.Parameter(language_model.norm.weight.detach().float().clone())
        self.register_buffer("embedding_VD", language_model.embed_tokens.weight.detach().float(), persistent=False)
        self.register_buffer("rates_R", language_model.rotary_emb.inv_freq.float(), persistent=False)
        self.compiled = compiled
        self._compiled: Callable[..., Tensor] = torch.compile(_layer, dynamic=False)

    def weights(self, dtype: torch.dtype) -> dict[str, tuple[Tensor, ...]]:
        """The matrices of each layer, deltas added; differentiable."""
        return {
            name: torch.baddbmm(getattr(self, f"base_{name}"), self.B[name], self.A[name]).to(dtype).unbind(0)
            for name in MATRICES
        }

    def rotations(self, positions_BS: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Cosines and sines (B, S, W) of rotary positions."""
        angles_BSR = positions_BS.float()[..., None] * self.rates_R
        angles_BSW = torch.cat([angles_BSR, angles_BSR], dim=-1)
        return angles_BSW.cos().to(dtype), angles_BSW.sin().to(dtype)

    def forward(
        self,
        x_BSD: Tensor,
        positions_BS: Tensor,
        first_bias_BSS: Tensor,
        bias_BSS: Tensor,
        gates: DenseGates,
        dtype: torch.dtype,
    ) -> Tensor:
        """Final hidden states (B, S, D), normalised, in float32.

        Args:
            x_BSD: embeddings.
            positions_BS: rotary positions.
            first_bias_BSS: added to the logits of attention in the first layer, and
            bias_BSS: in the others.
            gates: of the plans.
            dtype: of matrix products.
        """
        cos_BSW, sin_BSW = self.rotations(positions_BS, dtype)
        weights = self.weights(dtype)
        heads, columns = gates.heads_BLQ.to(dtype).unbind(1), gates.columns_BLI.to(dtype).unbind(1)
        first_bias_BSS, bias_BSS = first_bias_BSS.to(dtype), bias_BSS.to(dtype)
        layer = self._compiled if self.compiled else _layer
        x_BSD = x_BSD.float()
        norms = zip(self.norm_in.unbind(0), self.norm_post.unbind(0), strict=True)
        for number, (norm_in, norm_post) in enumerate(norms):
            x_BSD = layer(
                x_BSD,
                first_bias_BSS if number == 0 else bias_BSS,
                cos_BSW,
                sin_BSW,
                heads[number],
                columns[number],
                (norm_in, norm_post),
                tuple(weights[name][number] for name in MATRICES),
                self.eps,
                self.q_heads // self.kv_heads,
            )
        return _norm(x_BSD, self.norm_final, self.eps)


def _norm(x_BSD: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    return x_BSD * torch.rsqrt(x_BSD.square().mean(-1, keepdim=True) + eps) * weight_D


def _layer(
    x_BSD: Tensor,
    bias_BSS: Tensor,
    cos_BSW: Tensor,
    sin_BSW: Tensor,
    heads_BQ: Tensor,
    columns_BI: Tensor,
    norms: tuple[Tensor, Tensor],
    weights: tuple[Tensor, ...],
    eps: float,
    repeats: int,
) -> Tensor:
    """A decoder layer; the residual stream is float32, matrix products are of the weights' dtype.

    Args:
        x_BSD: the stream.
        bias_BSS: added to the logits of attention.
        cos_BSW, sin_BSW: rotations.
        heads_BQ, columns_BI: gates.
        norms: weights (D,) before attention and before the MLP.
        weights: the matrices, in the order of ``MATRICES``.
        eps: of the norms.
        repeats: query heads of a key-value head.
    """
    q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj, down_proj = weights
    dtype, width = q_proj.dtype, cos_BSW.shape[-1]
    h = _norm(x_BSD, norms[0], eps).to(dtype)
    q, k, v = (F.linear(h, weight).unflatten(-1, (-1, width)).transpose(1, 2) for weight in (q_proj, k_proj, v_proj))
    q, k = (rotate(x, cos_BSW, sin_BSW) for x in (q, k))
    k, v = (x.repeat_interleave(repeats, dim=1) for x in (k, v))
    bias = bias_BSS[:, None].expand(-1, q.shape[1], -1, -1)
    out_BSQW = F.scaled_dot_product_attention(q, k, v, attn_mask=bias).transpose(1, 2) * heads_BQ[:, None, :, None]
    x_BSD = x_BSD + F.linear(out_BSQW.flatten(2), o_proj)
    h = _norm(x_BSD, norms[1], eps).to(dtype)
    inner_BSI = F.silu(F.linear(h, gate_proj)) * F.linear(h, up_proj) * columns_BI[:, None]
    return x_BSD + F.linear(inner_BSI, down_proj)
