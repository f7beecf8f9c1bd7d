"""The larger embedded VLM: a LLaVA whose language model is SmolLM2-135M-Instruct, with a CLIP tower of its own.

``build_small`` makes it with a random tower and the language model as published; ``load_backbone("small")`` loads the
trained one.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import (
    CLIPVisionConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
)

from maskgym.backbones.loading.processing import llava_processor
from maskgym.backbones.small.smollm2 import find_file, load_language_model, load_tokenizer

IMAGE_TOKEN = "<image>"

IMAGE_SIZE, PATCH_SIZE = 128, 16
"""Pixels of a side: 64 visual tokens."""

VISION: dict[str, Any] = {
    "image_size": IMAGE_SIZE,
    "patch_size": PATCH_SIZE,
    "hidden_size": 192,
    "intermediate_size": 768,
    "num_hidden_layers": 6,
    "num_attention_heads": 6,
    "hidden_act": "gelu",
    "projection_dim": 192,
}

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}"
    "{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<image>{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}"
    "<|im_end|>\n"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def build_small(seed: int = 0, file: Path | None = None) -> tuple[LlavaForConditionalGeneration, LlavaProcessor]:
    """The architecture with a random vision tower and projector, its language model as published; and its processor.

    Args:
        seed: of the random weights.
        file: of the language model; by default that of the installed package.

    Raises:
        InputError: a package that is missing, or brings another file.
    """
    path = file or find_file()
    processor = build_processor(load_tokenizer(path))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return assemble(load_language_model(path), processor), processor


def build_processor(tokenizer: Any) -> LlavaProcessor:
    """The processor, whose tokenizer, that of the language model, gets a token for images."""
    tokenizer.add_special_tokens({"additional_special_tokens": [IMAGE_TOKEN]}, replace_extra_special_tokens=False)
    return llava_processor(tokenizer, IMAGE_SIZE, PATCH_SIZE, CHAT_TEMPLATE)


def assemble(language_model: LlamaForCausalLM, processor: LlavaProcessor) -> LlavaForConditionalGeneration:
    """A LLaVA of a language model, with a random vision tower and projector.

    Args:
        language_model: its word embeddings are the weights of its head, too; the tokens that only the processor
            has get rows of zeros there.
        processor: whose tokenizer is the language model's, with the token for images.
    """
    tokenizer: Any = processor.tokenizer
    text: Any = language_model.config
    words: Any = language_model.get_input_embeddings().weight
    text.vocab_size = len(tokenizer)
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**VISION),
        text_config=text,
        image_token_index=tokenizer.convert_tokens_to_ids(IMAGE_TOKEN),
        vision_feature_layer=-1,
        vision_feature_select_strategy="default",
        image_seq_length=(IMAGE_SIZE // PATCH_SIZE) ** 2,
        tie_word_embeddings=True,
    )
    model: Any = LlavaForConditionalGeneration(config).eval()
    weights = language_model.model.state_dict()
    weights["embed_tokens.weight"] = torch.cat([words, words.new_zeros(len(tokenizer) - len(words), words.shape[1])])
    model.model.language_model.load_state_dict(weights)
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    return model
