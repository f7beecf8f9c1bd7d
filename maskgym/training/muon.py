"""Muon for the matrices of a transformer, AdamW for the rest, as one optimiser.

Muon (Jordan et al., 2024) orthogonalises the momentum of weight matrices. From random weights the embedded VLM needed
about half the steps of AdamW alone to reach the same accuracy (docs/embedded-vlm.md).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn


class MuonAdamW(torch.optim.Optimizer):
    """Steps two optimisers of PyTorch's; their groups are this one's, so schedules reach both.

    Args:
        named_parameters: trainable parameters; matrices within layers go to Muon.
        muon_rate: learning rate of the matrices, on the scale of AdamW's (updates matched in size).
        adamw_rate: of the rest: embeddings, norms, biases, the output head.
        weight_decay: of both; vectors have none.
        beta2: of AdamW.
    """

    def __init__(
        self,
        named_parameters: Iterable[tuple[str, nn.Parameter]],
        muon_rate: float,
        adamw_rate: float,
        weight_decay: float = 0.05,
        beta2: float = 0.98,
    ):
        matrices: list[nn.Parameter] = []
        tables: list[nn.Parameter] = []
        vectors: list[nn.Parameter] = []
        for name, parameter in named_parameters:
            if not parameter.requires_grad:
                continue
            is_matrix = parameter.ndim == 2 and ".layers." in name
            (matrices if is_matrix else tables if parameter.ndim > 1 else vectors).append(parameter)
        self.muon = torch.optim.Muon(
            matrices, lr=muon_rate, weight_decay=weight_decay, momentum=0.95, adjust_lr_fn="match_rms_adamw"
        )
        groups: list[dict[str, Any]] = [{"params": tables}, {"params": vectors, "weight_decay": 0.0}]
        self.adamw = torch.optim.AdamW(groups, lr=adamw_rate, betas=(0.9, beta2), weight_decay=weight_decay)
        super().__init__([*matrices, *tables, *vectors], {})
        self.param_groups = [*self.muon.param_groups, *self.adamw.param_groups]

    def step(self, closure: Callable[[], float] | None = None) -> Any:
        """One step of both."""
        loss = None if closure is None else closure()
        self.muon.step()
        self.adamw.step()
        return loss

    def state_dict(self) -> dict[str, Any]:
        return {"muon": self.muon.state_dict(), "adamw": self.adamw.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.muon.load_state_dict(state_dict["muon"])
        self.adamw.load_state_dict(state_dict["adamw"])
        # Loading makes new groups.
        self.param_groups = [*self.muon.param_groups, *self.adamw.param_groups]
