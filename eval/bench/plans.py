"""Time to first token and time per output token of one query, by what a plan drops and how much."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from maskgym.backbones.backbone import Backbone
from maskgym.backbones.encodings.encoding import Encoding
from maskgym.backbones.plans.masks import Masks
from maskgym.eval.bench.engine import decoding, hugging_face, plan_at, prefill
from maskgym.eval.bench.shapes import encode_noise
from maskgym.eval.measure.latency import interleaved

Call = Callable[[], object]

AXES = ("tokens", "heads", "layers", "all")
SHARES = (0.75, 0.5, 0.35, 0.25)

REPEATS = 50
"""Rounds at most; time ends them before."""


def prefill_times(backbone: Backbone, seconds: float) -> list[dict[str, Any]]:
    """The prefill of one query by Hugging Face's decoder, under the full plan and under others.

    Args:
        backbone: runs the plans.
        seconds: to spend on repeats.

    Returns:
        By plan: ``share`` of the full prefill's FLOPs, ``ms`` (median), that ``over_full`` and ``over_hf``, and
        ``speedup_over_cut``; 1 is a perfect engine.
    """
    encoding = encode_noise(backbone, 1)
    plans = _plans(backbone, encoding)
    sides: dict[str, Call] = {"hf": partial(hugging_face, backbone, encoding)}
    sides |= {name: partial(prefill, backbone, encoding, masks) for name, masks in plans.items()}
    times = interleaved(sides, REPEATS, backbone.device, seconds=seconds)
    flops = {name: int(backbone.cost(encoding, masks).prefill[0]) for name, masks in plans.items()}
    return _rows(times, flops)


def token_times(backbone: Backbone, seconds: float, steps: int = 4) -> list[dict[str, Any]]:
    """As ``prefill_times``, of ``steps`` further tokens, decoded one after the other; milliseconds a token."""
    encoding = encode_noise(backbone, 1)
    plans = _plans(backbone, encoding)
    sides: dict[str, Call] = {"hf": _stock_decoding(backbone, encoding, steps)}
    sides |= {name: decoding(backbone, encoding, masks, steps) for name, masks in plans.items()}
    times = interleaved(sides, REPEATS, backbone.device, seconds=seconds)
    costs = {name: backbone.cost(encoding, masks, new_tokens=1 + steps) for name, masks in plans.items()}
    flops = {name: int(cost.decode[0]) for name, cost in costs.items()}
    return _rows({name: taken / steps for name, taken in times.items()}, flops)


def _plans(backbone: Backbone, encoding: Encoding) -> dict[str, Masks]:
    """The full plan, and others at shares of its FLOPs by each axis and by all.

    Heads are scattered: other ones in every layer, as trained controllers keep them.
    """
    others = {
        f"{axis} {100 * share:.0f} %": plan_at(backbone, encoding, axis, share, scattered=True)
        for share in SHARES
        for axis in AXES
    }
    return {"full": backbone.full(encoding), **others}


def _rows(times: dict[str, float], flops: dict[str, int]) -> list[dict[str, Any]]:
    shares = {"hf": 1.0, **{name: spent / flops["full"] for name, spent in flops.items()}}
    return [
        {
            "plan": name,
            "share": share,
            "ms": 1000 * times[name],
            "over_full": times[name] / times["full"],
            "over_hf": times[name] / times["hf"],
            "speedup_over_cut": times["full"] / times[name] * share,
        }
        for name, share in shares.items()
    ]


def _stock_decoding(backbone: Backbone, encoding: Encoding, steps: int) -> Call:
    """What decodes so many tokens by Hugging Face's own decoder and cache, each time anew."""
    decoder: Any = backbone.model.model.language_model
    x_1SD: Tensor = backbone.pack(encoding, backbone.full(encoding)).x_PD[None]
    cache = DynamicCache(config=decoder.config)
    with torch.no_grad():
        decoder(inputs_embeds=x_1SD, past_key_values=cache, use_cache=True)
    ids_11 = torch.full((1, 1), 5, device=backbone.device)

    def decode() -> None:
        with torch.no_grad():
            for _ in range(steps):
                hidden = decoder(input_ids=ids_11, past_key_values=cache, use_cache=True).last_hidden_state
                backbone.model.lm_head(hidden[:, -1])
        cache.crop(-steps)

    return decode
