"""Speed of the masked decoder on a LLaVA-1.5-like shape with random weights."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from tqdm import tqdm

from backbones.backbone import Backbone
from backbones.encoding import EncodedImage, Encoding
from backbones.families.llava import LlavaFamily
from backbones.masks import Masks
from backbones.tiny import build_tiny
from eval.latency import interleaved

Figure = tuple[str, float, str]

QUESTION = " ".join(["what", "color", "is", "the", "shape", "?"] * 6 + ["is", "there"])


def llava_like(hidden: int = 1024, layers: int = 8, heads: int = 16, intermediate: int = 2816) -> Backbone:
    """576 visual and 40 text tokens through a decoder of LLaVA-1.5's proportions; the vision tower is a token one."""
    torch.manual_seed(0)
    model, processor = build_tiny(
        [QUESTION],
        image_size=336,
        patch_size=14,
        hidden=hidden,
        layers=layers,
        heads=heads,
        intermediate=intermediate,
        positions=1024,
        vision_hidden=32,
        vision_layers=1,
    )
    family = LlavaFamily(model.requires_grad_(False), processor)
    return Backbone(family, f"LLaVA-like {layers} x {hidden}", protected_layers=())


def encode_noise(backbone: Backbone, rows: int) -> Encoding:
    """Random visual tokens; the vision side is not what is measured here."""
    count = backbone.layout.tokens
    images = [EncodedImage(torch.randn(count, backbone.hidden), count, torch.arange(count)) for _ in range(rows)]
    return backbone.assemble(images, [QUESTION] * rows)


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


def bench_engine(repeats: int = 9) -> list[Figure]:
    """Speed-up over FLOPs cut by axis, at batch 1 and mixed; overhead of the full plan; decoding."""
    backbone = llava_like()
    setting = f"{backbone.name}, 576 + 40 tokens, float32, {backbone.device}, {torch.get_num_threads()} threads"
    parts = (_by_axis, _mixed_batch, _decoding)
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
    x_PD, _, _ = backbone.pack(encoding, backbone.full(encoding))
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
                    backbone.extend(torch.tensor([[5]]), encoding.next_rope_B + step, fork)

        sides[name] = decode
    seconds = interleaved(sides, repeats, backbone.device)
    return [("tpot_half_layers", seconds["half"] / seconds["full"])]
