"""A tiny random-weight model of every family, built from its config with stock classes; nothing is downloaded."""

from __future__ import annotations

import torch
from transformers import (
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    Idefics3Config,
    Idefics3ForConditionalGeneration,
    Idefics3Processor,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaNextProcessor,
    LlavaProcessor,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    SmolVLMConfig,
    SmolVLMForConditionalGeneration,
)
from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil
from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from maskgym.backbones.loading.processing import ImageTextProcessor
from maskgym.backbones.tiny.build import CHAT_TEMPLATE, build_tokenizer

WORDS = ["what color is the shape ?", "is there a red circle in the image ?", "yes no red green blue circle"]
TEXT = {
    "hidden_size": 32,
    "intermediate_size": 44,
    "num_hidden_layers": 3,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "max_position_embeddings": 512,
    "bos_token_id": None,
    "tie_word_embeddings": False,
    "initializer_range": 0.25,
}
CLIP = {
    "image_size": 16,
    "patch_size": 4,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}


def _tokenizer(*special: str):
    tokenizer = build_tokenizer(WORDS)
    tokenizer.add_special_tokens({"additional_special_tokens": list(special)}, replace_extra_special_tokens=False)
    return tokenizer


def _text(tokenizer, **more) -> dict:
    ids = {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id}
    return {**TEXT, "vocab_size": len(tokenizer), **ids, **more}


def _finish(model, tokenizer):
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    return model.eval().requires_grad_(False)


def llava():
    tokenizer = _tokenizer()
    text = LlamaConfig(**_text(tokenizer, num_key_value_heads=8))
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**CLIP),
        text_config=text,
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        vision_feature_layer=-2,
        image_seq_length=16,
        tie_word_embeddings=False,
    )
    side = {"height": 16, "width": 16}
    images = CLIPImageProcessorPil(size=side, crop_size=side, do_center_crop=False)
    processor = LlavaProcessor(
        image_processor=images,
        tokenizer=tokenizer,
        patch_size=4,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=CHAT_TEMPLATE,
    )
    return _finish(LlavaForConditionalGeneration(config), tokenizer), processor


def llava_next():
    tokenizer = _tokenizer()
    pinpoints = [[16, 32], [32, 16], [32, 32]]
    config = LlavaNextConfig(
        vision_config=CLIPVisionConfig(**CLIP),
        text_config=LlamaConfig(**_text(tokenizer)),
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        image_grid_pinpoints=pinpoints,
        vision_feature_layer=-2,
        tie_word_embeddings=False,
    )
    side = {"height": 16, "width": 16}
    images = LlavaNextImageProcessorPil(
        size={"shortest_edge": 16}, crop_size=side, image_grid_pinpoints=pinpoints, do_center_crop=True
    )
    processor = LlavaNextProcessor(
        image_processor=images,
        tokenizer=tokenizer,
        patch_size=4,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=CHAT_TEMPLATE,
    )
    return _finish(LlavaNextForConditionalGeneration(config), tokenizer), processor


def _idefics3(config_class, model_class):
    markers = [f"<row_{row}_col_{column}>" for row in range(1, 7) for column in range(1, 7)]
    tokenizer = _tokenizer("<fake_token_around_image>", "<end_of_utterance>", "<global-img>", *markers)
    vision = {
        "image_size": 16,
        "patch_size": 4,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
    }
    config = config_class(
        vision_config=vision,
        text_config=LlamaConfig(**_text(tokenizer)),
        scale_factor=2,
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        tie_word_embeddings=False,
        pad_token_id=tokenizer.pad_token_id,
    )
    images = Idefics3ImageProcessorPil(
        size={"longest_edge": 48}, max_image_size={"longest_edge": 16}, do_image_splitting=True
    )
    processor = Idefics3Processor(images, tokenizer, image_seq_len=4, chat_template=CHAT_TEMPLATE)
    return _finish(model_class(config), tokenizer), processor


def idefics3():
    return _idefics3(Idefics3Config, Idefics3ForConditionalGeneration)


def smolvlm():
    return _idefics3(SmolVLMConfig, SmolVLMForConditionalGeneration)


def qwen2_5_vl():
    tokenizer = _tokenizer("<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")
    number = tokenizer.convert_tokens_to_ids
    text = _text(tokenizer, rope_parameters={"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 0]})
    vision = {
        "depth": 3,
        "hidden_size": 32,
        "intermediate_size": 44,
        "num_heads": 4,
        "out_hidden_size": 32,
        "patch_size": 4,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
        "window_size": 16,
        "fullatt_block_indexes": [1],
    }
    config = Qwen2_5_VLConfig(
        text_config=text,
        vision_config=vision,
        image_token_id=number("<|image_pad|>"),
        video_token_id=number("<|video_pad|>"),
        vision_start_token_id=number("<|vision_start|>"),
        vision_end_token_id=number("<|vision_end|>"),
        tie_word_embeddings=False,
    )
    images = Qwen2VLImageProcessorPil(
        patch_size=4, temporal_patch_size=2, merge_size=2, size={"shortest_edge": 64, "longest_edge": 24 * 64}
    )
    template = CHAT_TEMPLATE.replace("<image>", "<|vision_start|><|image_pad|><|vision_end|>")
    processor = ImageTextProcessor(images, tokenizer, template)
    return _finish(Qwen2_5_VLForConditionalGeneration(config), tokenizer), processor


BUILDERS = {
    "llava": llava,
    "llava_next": llava_next,
    "idefics3": idefics3,
    "smolvlm": smolvlm,
    "qwen2_5_vl": qwen2_5_vl,
}


def build_family(name: str, seed: int = 0):
    """Model and processor of a family."""
    torch.manual_seed(seed)
    return BUILDERS[name]()
