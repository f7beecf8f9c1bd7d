"""The embedded VLM: a LLaVA from ``transformers``' own classes, small enough for two CPU cores.

``build_tiny`` makes it with random weights; ``train_backbone.py`` trains it; the trained one is shipped beside this
file in ``tiny_weights/`` and loads with plain ``transformers`` as well.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

from maskgym.backbones.loading.processing import llava_processor

TINY_FOLDER = Path(__file__).parent.parent / "tiny_weights"

SPECIAL = ["<pad>", "<unk>", "</s>", "<image>", "USER:", "ASSISTANT:"]

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'user' %}USER: "
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<image> {% else %}{{ part['text'] }} {% endif %}"
    "{% endfor %}"
    "{% else %}ASSISTANT: {% for part in message['content'] %}{{ part['text'] }} {% endfor %}</s>{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)


def build_tokenizer(texts: Iterable[str]) -> PreTrainedTokenizerFast:
    """A word-level, lower-casing tokenizer whose vocabulary is the words of ``texts``."""
    normalizer = normalizers.Lowercase()
    split = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Punctuation()])
    words = {word for text in set(texts) for word, _ in split.pre_tokenize_str(normalizer.normalize_str(text))}
    vocab = {word: number for number, word in enumerate([*SPECIAL, *sorted(words)])}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    tokenizer.normalizer = normalizer
    tokenizer.pre_tokenizer = split
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        unk_token="<unk>",
        eos_token="</s>",
        additional_special_tokens=["<image>", "USER:", "ASSISTANT:"],
        clean_up_tokenization_spaces=False,
        padding_side="right",
    )


def build_tiny(
    texts: Iterable[str],
    image_size: int = 64,
    patch_size: int = 8,
    hidden: int = 128,
    layers: int = 6,
    heads: int = 4,
    kv_heads: int | None = None,
    intermediate: int = 256,
    positions: int = 256,
    vision_hidden: int = 96,
    vision_layers: int = 3,
) -> tuple[LlavaForConditionalGeneration, LlavaProcessor]:
    """The embedded architecture with random weights, and its processor.

    Args:
        texts: questions and answers whose words make the vocabulary.
        image_size: pixels of an image's side; with ``patch_size`` it gives the visual tokens (64 by default).
        patch_size: pixels of a patch's side.
        hidden: width of the decoder.
        layers: decoder layers.
        heads: attention heads of a decoder layer.
        kv_heads: key-value heads of a decoder layer; as many as heads by default.
        intermediate: width of the decoder's MLP.
        positions: longest sequence, visual tokens included.
        vision_hidden: width of the CLIP tower.
        vision_layers: layers of the CLIP tower.
    """
    tokenizer: Any = build_tokenizer(texts)
    vision = CLIPVisionConfig(
        image_size=image_size,
        patch_size=patch_size,
        hidden_size=vision_hidden,
        intermediate_size=2 * vision_hidden,
        num_hidden_layers=vision_layers,
        num_attention_heads=4,
        hidden_act="gelu",
        projection_dim=vision_hidden,
    )
    text = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads or heads,
        max_position_embeddings=positions,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        tie_word_embeddings=False,
        initializer_range=hidden**-0.5,
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        vision_feature_layer=-1,
        vision_feature_select_strategy="default",
        image_seq_length=(image_size // patch_size) ** 2,
        tie_word_embeddings=False,
    )
    model = LlavaForConditionalGeneration(config).eval()
    _scale_residual_stream(model)
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    return model, llava_processor(tokenizer, image_size, patch_size, CHAT_TEMPLATE)


@torch.no_grad()
def _scale_residual_stream(model: LlavaForConditionalGeneration) -> None:
    """Make the words as loud as the visual tokens and every layer's first contribution small, so that what the stream
    carries at the start is the input and not six random layers."""
    decoder: Any = model.model.language_model
    decoder.embed_tokens.weight.normal_(std=0.5)
    for layer in decoder.layers:
        for projection in (layer.self_attn.o_proj, layer.mlp.down_proj):
            projection.weight.mul_((2 * len(decoder.layers)) ** -0.5)
