"""What the phases share: their options, clock, metrics, batches and optimisers."""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
import tyro
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils.data import DataLoader

from maskgym.common import atomic
from maskgym.common.errors import InputError
from maskgym.training.grow.stream import Batch, Stream

TOKENIZER, LESSON_WORDS, POOLS, WEIGHTS, CHECKPOINT = (
    "tokenizer.json",
    "words.npz",
    "pools",
    "weights",
    "checkpoint.safetensors",
)
"""Names within the folder of a run."""

ROWS = 128
"""Plans drawn at once."""


@dataclasses.dataclass
class GrowConfig:
    """Grow the backbone ``small`` on a GPU, phase after phase in one folder; each goes on from what lies there.

    ``plans`` draws the pools of random plans and keeps the tokenizer (once, on the CPU). ``tower`` gives the vision
    tower its lessons. ``language`` trains everything: in full first, then under random plans as well. A phase that was
    stopped goes on from its last checkpoint with the same command. ``load_backbone(FOLDER/weights)`` loads what came of
    it.

    Examples:
      python -m maskgym.training.grow plans --out runs/small
      python -m maskgym.training.grow tower --out runs/small --images 128 --seconds 75
      python -m maskgym.training.grow language --out runs/small --seconds 425 --compile
    """

    phase: tyro.conf.Positional[Literal["plans", "tower", "language"]]
    """What to do."""
    out: Path
    """Folder of the run."""
    file: Path | None = None
    """The published language model; by default that of the installed package."""
    seconds: float = 60.0
    """Of training: rates and phases follow the clock."""
    steps: int = 10**9
    """Most optimiser steps, where the clock allows them."""
    images: int = 64
    """Images a step."""
    room: int = 253
    """Tokens of questions and answers an image; with the image and what stands before it best a multiple of 8."""
    rank: int = 32
    """Of the deltas."""
    rate: float = 7e-4
    """Peak learning rate of deltas and projector."""
    vision_rate: float = 3e-4
    """Peak learning rate of the tower, once there is language."""
    plain_share: float = 0.35
    """Share of the time before random plans join."""
    ramp_share: float = 0.2
    """Share of the time, from then on, until the smallest budgets have come in."""
    pool: int = 512
    """Plans of each pool to validate on, a multiple of 128; to train on, 16 times as many."""
    workers: int = 14
    """Processes that draw batches."""
    seed: int = 0
    """Of weights, batches and plans."""
    validate_every: float = 75.0
    """Seconds between validations and checkpoints."""
    device: Literal["cpu", "cuda"] = "cuda"
    """Where to train."""
    compile: bool = False
    """Compile the decoder's layer: after half a minute, twice as fast."""

    def check(self) -> None:
        """Refuse options that make no sense.

        Raises:
            InputError: naming the option, its value and what it must be; or what an earlier phase has not left.
        """
        rules = [(name, getattr(self, name) > 0, "above 0") for name in ("seconds", "rate", "vision_rate")]
        rules += [(name, getattr(self, name) >= 1, "at least 1") for name in ("steps", "images", "rank", "room")]
        rules += [(name, 0 <= getattr(self, name) <= 1, "between 0 and 1") for name in ("plain_share", "ramp_share")]
        rules += [("pool", self.pool > 0 and self.pool % ROWS == 0, f"a multiple of {ROWS}")]
        rules += [("workers", self.workers >= 0, "at least 0")]
        for name, holds, expected in rules:
            if not holds:
                raise InputError(f"--{name.replace('_', '-')} is {getattr(self, name)}; it must be {expected}")
        if self.phase == "plans":
            return
        if self.device == "cuda" and not torch.cuda.is_available():
            raise InputError("--device is cuda, which is not there; use --device cpu, for a try")
        if not (self.out / TOKENIZER).is_file():
            raise InputError(
                f"{str(self.out)!r} has no pools of plans yet; first: python -m maskgym.training.grow plans"
            )


class Run:
    """Clock and metrics of a phase."""

    def __init__(self, given: GrowConfig):
        self.given, self.began, self._trained, self._since = given, time.time(), 0.0, 0.0
        self._file = given.out / f"{given.phase}.jsonl"
        versions = {"torch": torch.__version__, "device": _device_name(given.device)}
        self.log(settings={name: str(value) for name, value in dataclasses.asdict(given).items()}, **versions)

    def log(self, **entries: Any) -> None:
        """Print a line of metrics, and add it to the run's."""
        line = json.dumps({"seconds": round(time.time() - self.began, 1), **entries})
        print(line, flush=True)
        with self._file.open("a", encoding="utf-8") as file:
            file.write(line + "\n")

    @property
    def trained(self) -> float:
        """Seconds of training so far."""
        return self._trained + (time.time() - self._since if self._since else 0.0)

    def start(self, trained: float | None = None) -> None:
        """Let the clock run, from so many seconds."""
        self._trained = self._trained if trained is None else trained
        self._since = time.time()

    def stop(self) -> None:
        """Stop the clock."""
        self._trained, self._since = self.trained, 0.0

    def progress(self, step: int) -> float:
        """Share of the training that is over, by the clock or by steps, whichever is further."""
        return max(self.trained / self.given.seconds, step / self.given.steps)


def _device_name(device: str) -> str:
    return torch.cuda.get_device_name() if device == "cuda" else device


def batches(given: GrowConfig, room: int, images: int, seed: int, workers: int) -> Iterator[Batch]:
    """Batches without end, on the device."""
    stream = Stream(str(given.out / TOKENIZER), images, room, seed)
    loader = DataLoader(
        stream,
        batch_size=None,
        num_workers=workers,
        prefetch_factor=3 if workers else None,
        pin_memory=given.device == "cuda",
    )
    for batch in loader:
        yield batch.to(given.device)


def rate_at(progress: float, warmup: float, decay: float) -> float:
    """Share of the peak rate: warm-up, plateau, and a linear decay to nothing."""
    return min(1.0, progress / warmup, max(0.0, (1 - progress) / decay))


def step_along(optimizer: torch.optim.Optimizer, loss: Tensor, parameters: Sequence[Tensor], rate: float) -> Tensor:
    """One step; returns the gradient's norm. What is not finite of the gradient counts as zero."""
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    norm = nn.utils.clip_grad_norm_(parameters, 1.0)
    for group in optimizer.param_groups:
        group["lr"] = group["peak"] * rate
    for parameter in parameters:
        if parameter.grad is not None:
            parameter.grad.nan_to_num_(0.0, 0.0, 0.0)
    optimizer.step()
    return norm


@dataclasses.dataclass
class Checkpoint:
    """Where a phase stands.

    Attributes:
        step: optimiser steps taken.
        trained: seconds of training.
        tensors: weights by name, and what the optimiser keeps of the parameter of a number, as ``optimizer.3.exp_avg``.
    """

    step: int
    trained: float
    tensors: dict[str, Tensor]

    @classmethod
    def of(cls, step: int, trained: float, model: nn.Module, optimizer: torch.optim.Optimizer) -> Checkpoint:
        """Of a model that is trained."""
        tensors = {name: parameter.detach() for name, parameter in model.named_parameters()}
        for number, kept in optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer.{number}.{name}": tensor for name, tensor in kept.items()}
        return cls(step, trained, tensors)

    def restore(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        """Put it back."""
        state: dict[int, dict[str, Tensor]] = {}
        for name, tensor in self.tensors.items():
            if name.startswith("optimizer."):
                _, number, kept = name.split(".")
                state.setdefault(int(number), {})[kept] = tensor
        weights = {name: tensor for name, tensor in self.tensors.items() if not name.startswith("optimizer.")}
        model.load_state_dict(weights, strict=False)  # what is published is not in it
        optimizer.load_state_dict(optimizer.state_dict() | {"state": state})

    def save(self, given: GrowConfig) -> None:
        """Write it, all or nothing."""
        where = {"step": str(self.step), "trained": str(self.trained)}
        unfinished = given.out / f".{given.phase}-{CHECKPOINT}"
        save_file({name: tensor.cpu().contiguous() for name, tensor in self.tensors.items()}, unfinished, where)
        atomic.sync(unfinished)
        unfinished.replace(given.out / f"{given.phase}-{CHECKPOINT}")

    @classmethod
    def load(cls, given: GrowConfig) -> Checkpoint | None:
        """The last one of a phase, if there is one."""
        path = given.out / f"{given.phase}-{CHECKPOINT}"
        if not path.is_file():
            return None
        with safe_open(path, framework="pt", device=given.device) as stored:
            where = stored.metadata()
            tensors = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118
        return cls(int(where["step"]), float(where["trained"]), tensors)
