"""Loading a processor, also where a part of it that images do not need cannot be built."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import AutoImageProcessor, AutoProcessor, AutoTokenizer


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
