"""Time to first token and time per output token of one query, by what a plan drops and how much."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from backbones.backbone import Backbone
from backbones.encoding import Encoding
from eval.bench_engine import decoding, hugging_face, plan_at, prefill
from eval.bench_shapes import encode_noise
from eval.latency import interleaved

AXES = ("tokens", "heads", "layers", "all")
SHARES = (0.75, 0.5, 0.35, 0.25)


def plan_times(backbone: Backbone, seconds: float, steps: int = 4) -> list[dict[str, Any]]:
    """Milliseconds of one query's prefill and of a further token, for Hugging Face's decoder, the full plan and others.

    Heads are scattered: other ones in every layer, as trained controllers keep them.

    Args:
        backbone: runs the plans.
        seconds: to spend on repeats, about half on prefills and half on tokens.
        steps: tokens decoded in a row.

    Returns:
        By plan: ``share`` of the LLM FLOPs, ``prefill_ms`` and ``token_ms`` (medians), each also over that of the full
        plan, ``speedup_over_cut`` (of the prefill; 1 is a perfect engine) and ``over_hf``.
    """
    encoding = encode_noise(backbone, 1)
    plans = {"full": backbone.full(encoding)}
    plans |= {
        f"{axis} {100 * share:.0f} %": plan_at(backbone, encoding, axis, share, scattered=True)
        for share in SHARES
        for axis in AXES
    }
    first = {name: partial(prefill, backbone, encoding, masks) for name, masks in plans.items()}
    stock = {"hf": partial(hugging_face, backbone, encoding)}
    prefills = interleaved(stock | first, 50, backbone.device, seconds=seconds / 2)
    further = {name: decoding(backbone, encoding, masks, steps) for name, masks in plans.items()}
    stock = {"hf": _stock_decoding(backbone, encoding, steps)}
    tokens = interleaved(stock | further, 50, backbone.device, seconds=seconds / 2)
    full_flops = int(backbone.full_llm_flops(encoding)[0])
    shares = {name: int(backbone.cost(encoding, masks).llm[0]) / full_flops for name, masks in plans.items()}
    return [
        {
            "plan": name,
            "share": share,
            "prefill_ms": 1000 * prefills[name],
            "token_ms": 1000 * tokens[name] / steps,
            "prefill_over_full": prefills[name] / prefills["full"],
            "token_over_full": tokens[name] / tokens["full"],
            "speedup_over_cut": prefills["full"] / prefills[name] * share,
            "prefill_over_hf": prefills[name] / prefills["hf"],
            "token_over_hf": tokens[name] / tokens["hf"],
        }
        for name, share in {"hf": 1.0, **shares}.items()
    ]


def _stock_decoding(backbone: Backbone, encoding: Encoding, steps: int) -> Any:
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
