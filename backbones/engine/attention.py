"""Causal attention within packed rows, by the fastest kernel that is there.

Shape legend: P packed tokens, b rows, S longest row, H query heads, G key-value heads, W head width, t new tokens.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from maskgym.backbones.engine.ragged import Ragged
from maskgym.common.errors import InputError

try:
    from flash_attn import flash_attn_varlen_func
except ImportError:
    flash_attn_varlen_func = None

KERNELS = ("auto", "sdpa", "flash")


def check_kernel(kernel: str) -> str:
    """The kernel's name, if it can run here.

    Raises:
        InputError: an unknown kernel, or FlashAttention-2 where it is not installed.
    """
    if kernel not in KERNELS:
        raise InputError(f"attention is {kernel!r}; it must be one of {', '.join(map(repr, KERNELS))}")
    if kernel == "flash" and flash_attn_varlen_func is None:
        raise InputError("attention is 'flash', but flash-attn is not installed; install it, or use attention='sdpa'")
    return kernel


def attend_within_rows(
    q_PHW: Tensor,
    k_PGW: Tensor,
    v_PGW: Tensor,
    ragged: Ragged,
    scale: float,
    kernel: str,
    mask_b1SS: Tensor | None = None,
) -> Tensor:
    """(P, H, W): every token attends to its own row up to itself.

    FlashAttention-2 takes the packed rows as they are. PyTorch's SDPA gets them padded at the end, where under the
    causal rule no token looks.

    Args:
        q_PHW: queries; H is a multiple of G.
        k_PGW: keys.
        v_PGW: values.
        ragged: the rows' lengths.
        scale: of the logits.
        kernel: ``"auto"`` takes FlashAttention-2 where it is installed and the tensors are half precision on CUDA.
        mask_b1SS: added to the logits in place of the causal rule, which it must contain; FlashAttention takes none.
    """
    half = q_PHW.dtype in (torch.float16, torch.bfloat16)
    flash = kernel == "flash" or (kernel == "auto" and flash_attn_varlen_func is not None and q_PHW.is_cuda and half)
    if flash and mask_b1SS is None:
        bounds, longest = ragged.bounds, ragged.longest
        return flash_attn_varlen_func(
            q_PHW, k_PGW, v_PGW, bounds, bounds, longest, longest, softmax_scale=scale, causal=True
        )
    q, k, v = (to_heads(x, ragged) for x in (q_PHW, k_PGW, v_PGW))
    gqa = q.shape[1] != k.shape[1]
    out = F.scaled_dot_product_attention(q, k, v, mask_b1SS, is_causal=mask_b1SS is None, scale=scale, enable_gqa=gqa)
    return ragged.unpad(out.transpose(1, 2).flatten(2)).unflatten(1, q_PHW.shape[1:])


def attend_to_cache(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """(b, t, H, W): t new tokens of every row attend to its cached keys (b, G, S, W) where ``mask`` (b, 1, t, S)
    allows; None allows all."""
    gqa = q.shape[1] != k.shape[1]
    return F.scaled_dot_product_attention(q, k, v, mask, scale=scale, enable_gqa=gqa).transpose(1, 2)


def rotate(x_PHW: Tensor, cos_PW: Tensor, sin_PW: Tensor) -> Tensor:
    """Rotary embedding of packed heads."""
    first, second = x_PHW.chunk(2, dim=-1)
    turned = torch.cat((-second, first), dim=-1)
    return x_PHW * cos_PW[:, None] + turned * sin_PW[:, None]


def to_heads(x_PHW: Tensor, ragged: Ragged) -> Tensor:
    """Packed heads as (b, H, S, W), rows padded at the end."""
    return ragged.pad(x_PHW.flatten(1)).unflatten(-1, x_PHW.shape[1:]).transpose(1, 2)
