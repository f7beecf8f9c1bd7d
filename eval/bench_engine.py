"""Speed of the masked decoder with random weights: speed-up over FLOPs cut, overhead, decoding."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from tqdm import tqdm

from backbones.backbone import Backbone
from backbones.encoding import Encoding
from backbones.masks import Masks
from eval.bench_first_token import first_token_figures
from eval.bench_shapes import SHAPES, encode_noise
from eval.latency import device_name, interleaved

Figure = tuple[str, float, str]


def plan_at(backbone: Backbone, encoding: Encoding, axis: str, share: float) -> Masks:
    """A plan that spends about ``share`` of the full FLOPs, by one axis or by all three alike."""
    layout = backbone.layout
    full = int(backbone.full_llm_flops(encoding)[0])

    def plan(keep: float) -> Masks:
        masks = layout.full(len(encoding))
        if axis in ("tokens", "all"):
            masks.tokens[:, round(keep * layout.tokens) :] = False
        if axis in ("heads", "all"):
            masks.heads[..., max(1, round(keep * layout.heads)) :] = False
        if axis in ("layers", "all"):
            masks.layers[:, max(1, round(keep * layout.layers)) :] = False
        return masks

    steps = [step / 200 for step in range(1, 201)]
    return plan(min(steps, key=lambda keep: abs(int(backbone.cost(encoding, plan(keep)).llm[0]) / full - share)))


def bench_engine(
    shape: str = "small", device: str = "cpu", dtype: torch.dtype = torch.float32, repeats: int = 9
) -> list[Figure]:
    """Speed-up over FLOPs cut by axis, at batch 1 and mixed; overhead of the full plan; decoding; and, on the shape
    that has LLaVA's own vision tower, the time to first token part by part."""
    backbone = SHAPES[shape](device, dtype)
    where = f"{device_name(backbone.device)}, {str(dtype).removeprefix('torch.')}"
    setting = f"{backbone.name}, {backbone.layout.tokens} + 40 tokens, {where}"
    parts = [_by_axis, _mixed_batch, _decoding, *([first_token_figures] if shape == "llava-1.5-7b" else [])]
    return [
        (name, value, setting)
        for part in tqdm(parts, desc="engine", leave=False)
        for name, value in part(backbone, repeats)
    ]


def _prefill(backbone: Backbone, encoding: Encoding, masks: Masks) -> None:
    with torch.no_grad():
        backbone.prefill(encoding, masks)


def _hugging_face(backbone: Backbone, encoding: Encoding) -> None:
    """The stock decoder on the full sequence, up to the first answer token's logits."""
    x_PD = backbone.pack(encoding, backbone.full(encoding)).x_PD
    with torch.no_grad():
        hidden = backbone.model.model.language_model(inputs_embeds=x_PD[None], use_cache=False).last_hidden_state
        backbone.model.lm_head(hidden[:, -1])


def _by_axis(backbone: Backbone, repeats: int) -> list[tuple[str, float]]:
    encoding = encode_noise(backbone, 1)
    plans = {
        f"{axis}_{percent}": plan_at(backbone, encoding, axis, percent / 100)
        for percent in (50, 25)
        for axis in ("tokens", "layers", "heads", "all")
    }
    full = backbone.full(encoding)
    sides: dict[str, Callable[[], object]] = {
        "hf": partial(_hugging_face, backbone, encoding),
        "full": partial(_prefill, backbone, encoding, full),
        **{name: partial(_prefill, backbone, encoding, masks) for name, masks in plans.items()},
    }
    seconds = interleaved(sides, repeats, backbone.device)
    flops = int(backbone.full_llm_flops(encoding)[0])
    figures = [("full_plan_overhead", seconds["full"] / seconds["hf"])]
    for name, masks in plans.items():
        cut = flops / int(backbone.cost(encoding, masks).llm[0])
        figures.append((f"speedup_over_cut_{name}", seconds["full"] / seconds[name] / cut))
    return figures


def _mixed_batch(backbone: Backbone, repeats: int) -> list[tuple[str, float]]:
    """Eight different plans in one batch: both shares by every axis."""
    encoding = encode_noise(backbone, 8)
    row = encoding.rows(torch.tensor([0]))
    masks = Masks.cat(
        [plan_at(backbone, row, axis, share) for share in (0.5, 0.25) for axis in ("tokens", "layers", "heads", "all")]
    )
    full = backbone.full(encoding)
    sides = {"full": partial(_prefill, backbone, encoding, full), "mixed": partial(_prefill, backbone, encoding, masks)}
    seconds = interleaved(sides, max(3, repeats // 3), backbone.device)
    cut = float(backbone.full_llm_flops(encoding).sum() / backbone.cost(encoding, masks).llm.sum())
    return [("speedup_over_cut_mixed_batch", seconds["full"] / seconds["mixed"] / cut)]


def _decoding(backbone: Backbone, repeats: int, steps: int = 8) -> list[tuple[str, float]]:
    """Time per output token with every second layer skipped, over that of the full plan."""
    encoding = encode_noise(backbone, 1)
    half = backbone.layout.full(1)
    half.layers[:, 1::2] = False
    sides: dict[str, Callable[[], object]] = {}
    for name, masks in (("full", backbone.full(encoding)), ("half", half)):
        with torch.no_grad():
            _, cache = backbone.prefill(encoding, masks, cache=True)
        assert cache is not None

        def decode(cache: object = cache) -> None:
            fork = cache.fork()  # type: ignore[attr-defined]
            with torch.no_grad():
                for step in range(steps):
                    backbone.extend(torch.tensor([[5]], device=backbone.device), encoding.next_rope_B + step, fork)

        sides[name] = decode
    seconds = interleaved(sides, repeats, backbone.device)
    return [("tpot_half_layers", seconds["half"] / seconds["full"])]
