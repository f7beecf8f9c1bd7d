"""A CUDA device that is not there: tensors are plain CPU tensors with a tag, which what is made of them inherits.

Like a real device it refuses to mix with others, so code that runs here keeps its tensors where the backbone is. It
knows no kernels and no time.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Iterator
from unittest import mock

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_flatten

CUDA = torch.device("cuda:0")

_GET_DEVICE, _IS_CUDA, _SET_DATA = Tensor.device.__get__, Tensor.is_cuda.__get__, Tensor.data.__set__
_INDEXING = {Tensor.__getitem__, Tensor.__setitem__, torch.index_put, Tensor.index_put, Tensor.index_put_}
_ANYWHERE = {"copy_", "__set__", "backward", "_has_compatible_shallow_copy_type"}
"""Operations that take tensors of several devices."""
_PLAIN = {"tolist", "item", "numpy", "__bool__", "size", "dim"}
"""Operations whose results are on no device."""

_tags: dict[int, weakref.ref[Tensor]] = {}


def tag(tensor: Tensor) -> Tensor:
    key = id(tensor)
    if key not in _tags:
        _tags[key] = weakref.ref(tensor, lambda _: _tags.pop(key, None))
    return tensor


def tagged(tensor: Tensor) -> bool:
    held = _tags.get(id(tensor))
    return held is not None and held() is tensor


def _is_cuda(device: object) -> bool:
    return str(device).startswith("cuda")


class FakeCuda(TorchFunctionMode):
    """Carries tags from operands to results, and answers for tagged tensors as CUDA would."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs, name = dict(kwargs or {}), getattr(func, "__name__", str(func))
        if func in (_GET_DEVICE, _IS_CUDA):
            there = tagged(args[0])
            return there if func == _IS_CUDA else CUDA if there else func(*args)
        if func is Tensor.to:
            return self._to(args, kwargs)
        if func in (Tensor.cpu, Tensor.cuda):
            moved = args[0].clone() if tagged(args[0]) != (func is Tensor.cuda) else args[0]
            return tag(moved) if func is Tensor.cuda else moved
        if func == _SET_DATA:  # how a module's weights move
            func(*args)
            return tag(args[0]) if tagged(args[1]) else _tags.pop(id(args[0]), None)
        asked = kwargs.get("device")
        if asked is not None and _is_cuda(asked):
            kwargs["device"] = "cpu"
        tensors = [leaf for leaf in tree_flatten((args, kwargs))[0] if isinstance(leaf, Tensor)]
        if name == "__get__":
            tensors = tensors[:1]
        self._check(func, name, args, tensors)
        result = func(*args, **kwargs)
        first = name.startswith("new_") and tensors and tagged(tensors[0])
        inherits = first if name.startswith("new_") else any(map(tagged, tensors))
        if name not in _PLAIN and (inherits if asked is None else _is_cuda(asked)):
            for leaf in tree_flatten(result)[0]:
                if isinstance(leaf, Tensor):
                    tag(leaf)
        return result

    @staticmethod
    def _to(args, kwargs):
        tensor, there = args[0], tagged(args[0])
        places = [part for part in (*args[1:], *kwargs.values()) if isinstance(part, str | torch.device | Tensor)]
        wanted = there
        for place in places:
            wanted = tagged(place) if isinstance(place, Tensor) else _is_cuda(place)
        here = [torch.device("cpu") if isinstance(part, str | torch.device) else part for part in args[1:]]
        named = {key: "cpu" if key == "device" else value for key, value in kwargs.items()}
        result = Tensor.to(tensor, *here, **named)
        if wanted != there and result is tensor:
            result = tensor.clone()
        return tag(result) if wanted else result

    @staticmethod
    def _check(func, name, args, tensors):
        """Refuse what CUDA refuses."""
        if func is Tensor.numpy and tensors and tagged(tensors[0]):
            raise TypeError("can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu() first")
        if func in (Tensor.__getitem__, Tensor.__setitem__):
            indices = args[1] if isinstance(args[1], tuple) else (args[1],)
            if not tagged(args[0]) and any(isinstance(each, Tensor) and tagged(each) for each in indices):
                raise RuntimeError("indices should be either on cpu or on the same device as the indexed tensor (cpu)")
        elif func not in _INDEXING and name not in _ANYWHERE:
            placed = {tagged(each) for each in tensors if each.dim() or tagged(each)}
            if len(placed) > 1:
                raise RuntimeError(f"Expected all tensors to be on the same device in {name}, but found cuda:0 and cpu")


@contextlib.contextmanager
def fake_cuda() -> Iterator[FakeCuda]:
    """Within, ``"cuda"`` is a device; models can be made on it and moved to it."""
    make = nn.Parameter.__new__

    def made(cls, data=None, requires_grad=True):
        parameter = make(cls, data, requires_grad)
        return tag(parameter) if data is not None and tagged(data) else parameter

    nothing = {
        name: mock.DEFAULT for name in ("synchronize", "reset_peak_memory_stats", "empty_cache", "max_memory_allocated")
    }
    with (
        mock.patch.object(nn.Parameter, "__new__", made),
        mock.patch.multiple(torch.cuda, **nothing) as patched,
        mock.patch.multiple(
            torch.cuda,
            is_available=lambda: True,
            device_count=lambda: 1,
            current_device=lambda: 0,
            set_device=lambda device: None,
            is_bf16_supported=lambda *_: True,
            get_device_capability=lambda device=None: (9, 0),
            get_device_name=lambda device=None: "fake",
            get_device_properties=lambda device=None: mock.Mock(total_memory=8 * 10**10),
        ),
        mock.patch.object(torch.cuda.random, "get_rng_state", lambda *_: torch.get_rng_state()),
        FakeCuda() as mode,
    ):
        patched["max_memory_allocated"].return_value = 0
        yield mode
