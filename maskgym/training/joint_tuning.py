"""The backbone's weights learn together with a controller, as AdaLLaVA's do.

The language model's layers learn; vision tower, projector and embeddings stay, so images are still encoded once. What
learns is kept in float32, whatever type the backbone computes in: adapters are, and narrow weights follow a copy.

Shape legend: B rows, A flat action length.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from peft import PeftModel, get_peft_model
from torch import Tensor

from maskgym.backbones.backbone import Backbone
from maskgym.backbones.encodings.encoding import EncodingBank
from maskgym.backbones.executed import executed_answer_logits
from maskgym.backbones.plans.masks import Masks
from maskgym.common.errors import InputError, queries_named
from maskgym.common.finite import refuse_bad_gradients
from maskgym.envs.data.scoring import reference
from maskgym.policies.adapters import lora_config, save_model
from maskgym.policies.relaxation.training import answer_targets
from maskgym.training.checkpoints import optimizer_tensors, restore_optimizer
from maskgym.training.loss_scale import LossScale

WAYS = ("off", "lora", "full")
RANK = 16
BATCH = 64
PREFIX = "backbone."


class JointTuning:
    """Weights of a backbone that learn, and their optimiser (AdamW, the rate falling linearly to zero).

    Args:
        backbone: changed in place.
        way: ``"lora"``: adapters of rank 16 on the layers' projections; ``"full"``: layers and final norm.
        learning_rate: at the start.

    Raises:
        InputError: another way.
    """

    def __init__(self, backbone: Backbone, way: str, learning_rate: float):
        self.backbone, self.learning_rate = backbone, learning_rate
        self.model: Any = backbone.model
        if way == "lora":
            self.model = get_peft_model(backbone.model, lora_config(backbone, RANK))
        elif way == "full":
            decoder: Any = backbone.decoder.model
            for part in (decoder.layers, decoder.norm):
                part.requires_grad_(True)
        else:
            raise InputError(f"--tune-backbone is {way!r}; it must be one of {', '.join(WAYS)}")
        backbone.model.eval()  # adapters come in training mode, with dropout
        self.weights = {name: weight for name, weight in self.model.named_parameters() if weight.requires_grad}
        self.masters = {name: _master(weight) for name, weight in self.weights.items()}
        self.optimizer = torch.optim.AdamW(self.masters.values(), lr=learning_rate, weight_decay=0.0)
        refuse_bad_gradients(self.optimizer, self._where)
        self.scale = LossScale(backbone)

    def step(self, progress: float, scale: LossScale) -> None:
        """Follow the gradients that have been computed, after a share of the training.

        Args:
            progress: the share.
            scale: of the loss that they are of.
        """
        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate * (1 - progress)
        pairs = zip(self.weights.values(), self.masters.values(), strict=True)
        narrow = [(weight, master) for weight, master in pairs if weight is not master]
        for weight, master in narrow:
            master.grad = None if weight.grad is None else weight.grad.float()
            weight.grad = None
        scale.step(self.optimizer, self.masters.values())
        with torch.no_grad():
            for weight, master in narrow:
                weight.copy_(master)
        self.optimizer.zero_grad()

    @staticmethod
    def _where() -> str:
        return "in the tuned backbone"

    def learn(self, bank: EncodingBank, numbers: Sequence[int] | np.ndarray, masks: Masks, progress: float) -> float:
        """Learn the answers of some queries under plans that are executed; returns the mean loss.

        Args:
            bank: the queries.
            numbers: B of them.
            masks: B plans.
            progress: share of the training that is done.
        """
        losses = []
        for start in range(0, len(numbers), BATCH):
            some = slice(start, start + BATCH)
            answers = [
                self.backbone.answer_ids(reference(bank.source.text(int(number))[2])) for number in numbers[some]
            ]
            encoding = bank.gather(numbers[some], answers)
            logits_TV = executed_answer_logits(self.backbone, encoding, masks[some], answers)
            loss = F.cross_entropy(logits_TV, answer_targets(self.backbone, answers))
            if not loss.isfinite():
                raise InputError(
                    f"the tuned backbone's loss is {loss.item()} ({queries_named(encoding.ids)}); lower --tune-rate "
                    f"(now {self.learning_rate:g})"
                )
            self.scale.backward(loss)
            self.step(progress, self.scale)
            self.scale.update(self._where)
            losses.append(loss.item())
        return float(np.mean(losses))

    def tensors(self) -> dict[str, Tensor]:
        """Weights and optimiser, for a checkpoint."""
        weights = {f"{PREFIX}{name}": master.detach() for name, master in self.masters.items()}
        more = optimizer_tensors(self.optimizer) | self.scale.tensors()
        return weights | {f"{PREFIX}{name}": value for name, value in more.items()}

    def restore(self, tensors: dict[str, Tensor]) -> None:
        """Continue from a checkpoint."""
        own = {name.removeprefix(PREFIX): value for name, value in tensors.items() if name.startswith(PREFIX)}
        with torch.no_grad():
            for name, weight in self.weights.items():
                self.masters[name].copy_(own[name])
                weight.copy_(own[name])
        restore_optimizer(self.optimizer, own)
        self.scale.restore(own)

    def save(self, folder: Path) -> None:
        """Write what ``load_backbone`` reads: adapters, or the whole model.

        Adapters then become part of the weights, as they do when loaded: what follows is done by what was saved.
        """
        save_model(self.model, self.backbone, folder)
        if isinstance(self.model, PeftModel):
            self.model.merge_and_unload()


def _master(weight: Tensor) -> Tensor:
    """What learns: the weight, or, of a narrow one, which would round small steps away, a copy in float32."""
    return weight if weight.dtype.itemsize >= 4 else weight.detach().float().requires_grad_()
