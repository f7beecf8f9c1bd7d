"""What training made of ``small``, beside its published language model: low-rank changes of the projections, the norms,
and the vision tower and projector whole.

They lie as safetensors in one folder, in as many files as its writer likes, beside ``deltas.json``, which names the
language model. The tensors, of any floating-point type, are

- ``lora.q_proj.A`` (L, R, in) and ``lora.q_proj.B`` (L, out, R), and so on for all projections of a layer: the weight
  of layer l is that of the language model plus B[l] @ A[l];
- ``norm.input`` and ``norm.post`` (L, D) and ``norm.final`` (D): the weights of the norms themselves;
- those of ``model.vision_tower`` and ``model.multi_modal_projector``, by their names in the model.

Shape legend: L layers, D hidden width, R rank.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from maskgym.common.errors import InputError, first_line
from maskgym.common.plain_files import MALFORMED, check_inside, check_regular, read_json

SETTINGS, BASE = "deltas.json", "smollm2"
"""The file that makes a folder one of deltas, and the language model that its ``base`` must name."""

ATTENTION, MLP = ("q_proj", "k_proj", "v_proj", "o_proj"), ("gate_proj", "up_proj", "down_proj")

WHOLE = ("model.vision_tower.", "model.multi_modal_projector.")
"""How the tensors begin that are shipped as they are."""


def holds_deltas(where: str | Path) -> bool:
    """Whether deltas lie in a folder."""
    return isinstance(where, Path) and (where / SETTINGS).is_file()


def delta_files(folder: Path, name: str) -> list[Path]:
    """The files of a folder of deltas, in the order of their names.

    Args:
        folder: of them.
        name: of the backbone, in messages.

    Raises:
        InputError: none, or deltas of another language model.
    """
    try:
        base = read_json(folder / SETTINGS)["base"]
    except MALFORMED as error:
        raise InputError(
            f'backbone {name!r} has an unreadable {SETTINGS} ({error!r}); it must be {{"base": "{BASE}"}}'
        ) from error
    if base != BASE:
        raise InputError(f"backbone {name!r} has deltas of {base!r:.80}; only those of {BASE!r} can be applied")
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise InputError(f"backbone {name!r} has no weights yet: there is no safetensors file in {str(folder)!r}")
    for file in files:
        check_inside(file, folder)
    return files


def digest(files: list[Path]) -> str:
    """A checksum of all files together, 64 hexadecimal digits.

    Raises:
        OSError, ValueError: a file that cannot be read.
    """
    sums = []
    for path in files:
        check_regular(path)
        with path.open("rb") as file:
            sums.append(hashlib.file_digest(file, "sha256").digest())
    return hashlib.sha256(b"".join(sums)).hexdigest()


@torch.no_grad()
def apply_deltas(model: Any, files: list[Path], name: str) -> None:
    """Change a model's weights, in their type, to those that training made of them.

    Args:
        model: a LLaVA whose language model has its published weights.
        files: of deltas.
        name: of the backbone, in messages.

    Raises:
        InputError: unreadable files, or tensors that are not those of this model; then nothing has been changed.
    """
    tensors = _read(files, name)
    _check(tensors, model, name)
    for number, layer in enumerate(model.model.language_model.layers):
        for kind, linear in _projections(layer):
            a, b = (tensors[f"lora.{kind}.{part}"][number].to(linear.weight) for part in "AB")
            linear.weight += b @ a
        layer.input_layernorm.weight.copy_(tensors["norm.input"][number])
        layer.post_attention_layernorm.weight.copy_(tensors["norm.post"][number])
    model.model.language_model.norm.weight.copy_(tensors["norm.final"])
    for key, weight in _whole(model):
        weight.copy_(tensors[key])


def _projections(layer: Any) -> Iterator[tuple[str, Any]]:
    """The linear maps of a layer, by name."""
    yield from ((kind, getattr(layer.self_attn, kind)) for kind in ATTENTION)
    yield from ((kind, getattr(layer.mlp, kind)) for kind in MLP)


def _whole(model: Any) -> Iterator[tuple[str, Tensor]]:
    return ((key, weight) for key, weight in model.state_dict().items() if key.startswith(WHOLE))


def _read(files: list[Path], name: str) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for file in files:
        try:
            check_regular(file)
            more = load_file(file)
        except (OSError, ValueError, SafetensorError) as error:
            raise InputError(f"backbone {name!r}: {file.name} could not be read ({first_line(error)})") from error
        twice = tensors.keys() & more.keys()
        if twice:
            raise InputError(f"backbone {name!r} has the tensor {min(twice)!r} twice, also in {file.name}; remove one")
        tensors |= more
    return tensors


def _check(tensors: dict[str, Tensor], model: Any, name: str) -> None:
    """Refuse other tensors than the model's, or tensors of other shapes."""
    shapes = _shapes(model, tensors)
    missing, strange = sorted(shapes.keys() - tensors.keys()), sorted(tensors.keys() - shapes.keys())
    if missing:
        raise _misfit(name, f"no tensor {missing[0]!r}")
    if strange:
        raise _misfit(name, f"a tensor {strange[0][:80]!r}, which the model does not have")
    for key, tensor in sorted(tensors.items()):
        if tuple(tensor.shape) != shapes[key]:
            raise _misfit(name, f"{key!r} of shape {tuple(tensor.shape)}, not {shapes[key]}")
        if not tensor.is_floating_point() or not bool(tensor.isfinite().all()):
            raise _misfit(name, f"{key!r} with values that are no finite floating-point numbers")


def _misfit(name: str, problem: str) -> InputError:
    return InputError(f"backbone {name!r} has {problem}; save its deltas again")


def _shapes(model: Any, tensors: dict[str, Tensor]) -> dict[str, tuple[int, ...]]:
    """The shapes of a model's deltas, where these have the ranks."""
    decoder = model.model.language_model
    layers, hidden = len(decoder.layers), len(decoder.norm.weight)
    shapes: dict[str, tuple[int, ...]] = {key: tuple(weight.shape) for key, weight in _whole(model)}
    for kind, linear in _projections(decoder.layers[0]):
        a = tensors.get(f"lora.{kind}.A", torch.empty(0))
        rank = a.shape[1] if a.dim() == 3 else 1
        shapes[f"lora.{kind}.A"] = (layers, rank, linear.in_features)
        shapes[f"lora.{kind}.B"] = (layers, linear.out_features, rank)
    return shapes | {"norm.input": (layers, hidden), "norm.post": (layers, hidden), "norm.final": (hidden,)}
