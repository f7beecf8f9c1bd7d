"""Processors: those of the embedded VLMs, and loading one, also where a part of it that images do not need cannot be
built."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import AutoImageProcessor, AutoProcessor, AutoTokenizer, CLIPImageProcessorPil, LlavaProcessor


@dataclass
class ImageTextProcessor:
    """Image processor and tokenizer alone.

    ``transformers`` cannot build the processor of a family that also takes videos where torchvision is missing; for
    images and text these two parts are all it takes.

    Attributes:
        image_processor: of the model.
        tokenizer: of the model.
        chat_template: if the tokenizer has none.
    """

    image_processor: Any
    tokenizer: Any
    chat_template: str | None = None

    def apply_chat_template(self, messages: Any, **options: Any) -> Any:
        """As the tokenizer's, which sees the images as parts of the messages."""
        return self.tokenizer.apply_chat_template(messages, chat_template=self.chat_template, **options)


def load_processor(where: str | Path) -> Any:
    """The processor of a folder or hub id."""
    try:
        return AutoProcessor.from_pretrained(where, trust_remote_code=False)
    except (ImportError, AttributeError):  # a video processor without torchvision
        template = Path(where) / "chat_template.jinja"
        return ImageTextProcessor(
            AutoImageProcessor.from_pretrained(where, trust_remote_code=False),
            AutoTokenizer.from_pretrained(where, trust_remote_code=False),
            template.read_text(encoding="utf-8") if template.is_file() else None,
        )


def llava_processor(tokenizer: Any, image_size: int, patch_size: int, chat_template: str) -> LlavaProcessor:
    """The processor of an embedded LLaVA, which sees an image of any shape as a square.

    Args:
        tokenizer: with the token ``<image>``.
        image_size: pixels of the square's side.
        patch_size: pixels of a patch's side.
        chat_template: of the prompts.
    """
    side = {"height": image_size, "width": image_size}
    image_processor = CLIPImageProcessorPil(
        do_resize=True,
        size=side,
        do_center_crop=False,
        crop_size=side,
        # White and black must point opposite ways: the tower's first LayerNorm sees directions, not magnitudes.
        image_mean=[0.5, 0.5, 0.5],
        image_std=[0.25, 0.25, 0.25],
        do_convert_rgb=True,
    )
    return LlavaProcessor(
        image_processor=image_processor,
        tokenizer=tokenizer,
        patch_size=patch_size,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=chat_template,
    )
