"""Speed of the masked decoder with random weights: speed-up over FLOPs cut, overhead, decoding."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable
from functools import partial

import torch
from tqdm import tqdm

from maskgym.backbones.backbone import Backbone
from maskgym.backbones.encodings.encoding import Encoding
from maskgym.backbones.plans.masks import Masks
from maskgym.eval.bench.first_token import first_token_figures
from maskgym.eval.bench.shapes import SHAPES, encode_noise
from maskgym.eval.measure.latency import device_name, interleaved

Figure = tuple[str, float, str]


def plan_at(backbone: Backbone, encoding: Encoding, axis: str, share: float, scattered: bool = False) -> Masks:
    """A plan that spends about ``share`` of the full FLOPs, by one axis or by all three alike.

    Args:
        backbone: prices the plan.
        encoding: B queries, all under this plan.
        axis: ``"tokens"``, ``"heads"``, ``"layers"`` or ``"all"``.
        share: of the full plan's FLOPs.
        scattered: keep other heads in every layer, as trained controllers do; by default the first ones of all layers,
            whose weights need no copy.
    """
    layout, device = backbone.layout, encoding.visual_BND.device
    full = int(backbone.full_llm_flops(encoding)[0])
    order_LH = torch.arange(layout.heads).expand(layout.layers, -1)
    if scattered:
        order_LH = torch.rand(order_LH.shape, generator=torch.Generator().manual_seed(0)).argsort(1)

    def plan(keep: float) -> Masks:
        masks = layout.full(len(encoding), device)
        if axis in ("tokens", "all"):
            masks.tokens[:, round(keep * layout.tokens) :] = False
        if axis in ("heads", "all"):
            kept_LH = order_LH < max(1, round(keep * layout.heads))
            masks.heads.copy_(kept_LH.to(device).expand_as(masks.heads))
        if axis in ("layers", "all"):
            masks.layers[:, max(1, round(keep * layout.layers)) :] = False
        return masks

    def spent(keep: float) -> float:
        return int(backbone.cost(encoding, plan(keep)).llm[0]) / full

    steps = [step / 200 for step in range(1, 201)]
    above = bisect_left(steps, share, key=spent)  # more is kept for more
    near = steps[max(0, above - 1) : above + 1]
    return plan(min(near, key=lambda keep: abs(spent(keep) - share)))


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


def prefill(backbone: Backbone, encoding: Encoding, masks: Masks) -> None:
    with torch.no_grad():
        backbone.prefill(encoding, masks)


def hugging_face(backbone: Backbone, encoding: Encoding) -> None:
    """The stock decoder on the full sequences, equally long ones, up to the first answer token's logits."""
    x_PD = backbone.pack(encoding, backbone.full(encoding)).x_PD
    x_BSD = x_PD.unflatten(0, (len(encoding), -1))
    with torch.no_grad():
        hidden = backbone.model.model.language_model(inputs_embeds=x_BSD, use_cache=False).last_hidden_state
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
        "hf": partial(hugging_face, backbone, encoding),
        "full": partial(prefill, backbone, encoding, full),
        **{name: partial(prefill, backbone, encoding, masks) for name, masks in plans.items()},
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
    sides = {"full": partial(prefill, backbone, encoding, full), "mixed": partial(prefill, backbone, encoding, masks)}
    seconds = interleaved(sides, max(3, repeats // 3), backbone.device)
    cut = float(backbone.full_llm_flops(encoding).sum() / backbone.cost(encoding, masks).llm.sum())
    return [("speedup_over_cut_mixed_batch", seconds["full"] / seconds["mixed"] / cut)]


def _decoding(backbone: Backbone, repeats: int, steps: int = 8) -> list[tuple[str, float]]:
    """Time per output token with every second layer skipped, over that of the full plan."""
    encoding = encode_noise(backbone, 1)
    half = backbone.full(encoding)
    half.layers[:, 1::2] = False
    plans = {"full": backbone.full(encoding), "half": half}
    sides = {name: decoding(backbone, encoding, masks, steps) for name, masks in plans.items()}
    seconds = interleaved(sides, repeats, backbone.device)
    return [("tpot_half_layers", seconds["half"] / seconds["full"])]


def decoding(backbone: Backbone, encoding: Encoding, masks: Masks, steps: int) -> Callable[[], None]:
    """What decodes so many tokens a row under prefilled plans, each time anew."""
    with torch.no_grad():
        _, cache = backbone.prefill(encoding, masks, cache=True)
    ids_B1 = torch.full((len(encoding), 1), 5, device=backbone.device)

    def decode() -> None:
        assert cache is not None
        fork = cache.fork()
        with torch.no_grad():
            for step in range(steps):
                backbone.extend(ids_B1, encoding.next_rope_B + step, fork)

    return decode
