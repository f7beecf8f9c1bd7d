"""Gradients through a VLM of float16 weights, within what the type can hold.

Most gradients of activations are below the least number that float16 has. The loss is therefore multiplied by a power
of two before they are taken, and what reaches the float32 weights that learn is divided by it again (Micikevicius et
al., ICLR 2018). In other types the factor is 1, and nothing is done.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from maskgym.backbones.backbone import Backbone
from maskgym.common.errors import InputError

FIRST = 2.0**10
"""Factor at the start. It doubles after many good steps; a step with a gradient that is not finite is left out, and
halves it."""

NAME, ENTRIES = "loss_scale", ("scale", "_growth_tracker")
"""Of the tensor in a checkpoint, and the scaler's own of what it holds."""


class LossScale:
    """PyTorch's ``GradScaler`` for a backbone's type, which ends a training that it cannot help.

    Args:
        backbone: that the loss goes through.
    """

    def __init__(self, backbone: Backbone):
        narrow = backbone.model.dtype == torch.float16
        self.scaler = torch.amp.GradScaler(backbone.device.type, init_scale=FIRST, enabled=narrow)

    def backward(self, loss: Tensor) -> None:
        self.scaler.scale(loss).backward()

    def step(self, optimizer: torch.optim.Optimizer, weights: Iterable[Tensor], most: float = 1.0) -> None:
        """Follow the gradient, clipped to a norm of ``most``, unless it is beyond the type."""
        self.scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(weights, most)
        self.scaler.step(optimizer)

    def update(self, where: Callable[[], str]) -> None:
        """After the steps that follow one ``backward``.

        Args:
            where: what the message says of the place.

        Raises:
            InputError: gradients that are not finite at any factor.
        """
        self.scaler.update()
        check_scale(self.scaler, where)

    def tensors(self) -> dict[str, Tensor]:
        """What a checkpoint keeps of it, if there is anything to scale."""
        state = self.scaler.state_dict()
        return {NAME: torch.tensor([state[entry] for entry in ENTRIES], dtype=torch.float64)} if state else {}

    def restore(self, tensors: dict[str, Tensor]) -> None:
        """Continue from there; checkpoints of earlier versions have nothing."""
        if NAME in tensors:
            scale, tracker = tensors[NAME].tolist()
            self.scaler.load_state_dict({**self.scaler.state_dict(), "scale": scale, "_growth_tracker": int(tracker)})


def check_scale(scaler: torch.amp.GradScaler, where: Callable[[], str]) -> None:
    """Refuse to go on once nothing is left to divide by.

    Raises:
        InputError: saying where.
    """
    if scaler.is_enabled() and scaler.get_scale() < 1:
        raise InputError(
            f"gradients are not finite {where()}, and halving the loss has not helped; lower --learning-rate, or give "
            "--dtype a wider type"
        )
