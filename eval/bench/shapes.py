"""Models with random weights on which speed is measured, and queries for them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

from maskgym.backbones.backbone import Backbone
from maskgym.backbones.encodings.encoding import EncodedImage, Encoding
from maskgym.backbones.families.llava import LlavaFamily
from maskgym.backbones.tiny.build import build_tiny

QUESTION = " ".join(["what", "color", "is", "the", "shape", "?"] * 6 + ["is", "there"])


def llava_like(
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
    hidden: int = 1024,
    layers: int = 8,
    heads: int = 16,
    intermediate: int = 2816,
) -> Backbone:
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
    placed: Any = model.requires_grad_(False)
    family = LlavaFamily(placed.to(device, dtype), processor)
    return Backbone(family, f"LLaVA-like {layers} x {hidden}", protected_layers=())


CLIP_LARGE: dict[str, Any] = {
    "image_size": 336,
    "patch_size": 14,
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "projection_dim": 768,
}
VICUNA_7B: dict[str, Any] = {
    "vocab_size": 32064,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "max_position_embeddings": 4096,
}


def llava_7b(
    device: str = "cuda",
    dtype: torch.dtype = torch.bfloat16,
    vision: dict[str, Any] | None = None,
    text: dict[str, Any] | None = None,
) -> Backbone:
    """LLaVA-1.5-7B from its config, with random weights: 24-layer CLIP tower, 576 visual tokens, 32 x 4096 decoder.

    Args:
        device: where the weights are made; in bfloat16 they take 14 GB.
        dtype: of the weights.
        vision: other sizes of the tower.
        text: other sizes of the language model.
    """
    torch.manual_seed(0)
    tower = CLIP_LARGE | (vision or {})
    image = {name: tower[name] for name in ("image_size", "patch_size")}
    processor = build_tiny([QUESTION], **image, hidden=32, layers=1)[1]
    tokenizer: Any = processor.tokenizer
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**tower),
        text_config=LlamaConfig(**(VICUNA_7B | (text or {}))),
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
    )
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            model = LlavaForConditionalGeneration(config).eval().requires_grad_(False)
    finally:
        torch.set_default_dtype(before)
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    return Backbone(LlavaFamily(model, processor), "LLaVA-1.5-7B shape", protected_layers=())


SHAPES: dict[str, Callable[[str, torch.dtype], Backbone]] = {"small": llava_like, "llava-1.5-7b": llava_7b}


def encode_noise(backbone: Backbone, rows: int) -> Encoding:
    """Random visual tokens; the vision side is not what is measured here."""
    count, like = backbone.layout.tokens, backbone.model.lm_head.weight
    noise = [torch.randn(count, backbone.hidden, dtype=like.dtype, device=like.device) for _ in range(rows)]
    images = [EncodedImage(visual_nD, count, torch.arange(count)) for visual_nD in noise]
    return backbone.assemble(images, [QUESTION] * rows)
