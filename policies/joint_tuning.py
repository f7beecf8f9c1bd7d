"""The backbone's weights learn together with a controller, as AdaLLaVA's do.

The language model's layers learn; vision tower, projector and embeddings stay, so images are still encoded once.

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
from maskgym.backbones.encoding import EncodingBank
from maskgym.backbones.errors import InputError, queries_named
from maskgym.backbones.executed import executed_answer_logits
from maskgym.backbones.finite import refuse_bad_gradients
from maskgym.backbones.masks import Masks
from maskgym.envs.scoring import reference
from maskgym.policies.adapters import lora_config, save_model
from maskgym.policies.checkpoints import optimizer_tensors, restore_optimizer
from maskgym.policies.relaxed_training import answer_targets

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
        self.optimizer = torch.optim.AdamW(self.weights.values(), lr=learning_rate, weight_decay=0.0)
        refuse_bad_gradients(self.optimizer, lambda: "in the tuned backbone")

    def step(self, progress: float) -> None:
        """Follow the gradients that have been computed, after a share of the training."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate * (1 - progress)
        torch.nn.utils.clip_grad_norm_(self.weights.values(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()

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
            loss.backward()
            self.step(progress)
            losses.append(loss.item())
        return float(np.mean(losses))

    def tensors(self) -> dict[str, Tensor]:
        """Weights and optimiser, for a checkpoint."""
        weights = {f"{PREFIX}{name}": weight.detach() for name, weight in self.weights.items()}
        return weights | {f"{PREFIX}{name}": value for name, value in optimizer_tensors(self.optimizer).items()}

    def restore(self, tensors: dict[str, Tensor]) -> None:
        """Continue from a checkpoint."""
        own = {name.removeprefix(PREFIX): value for name, value in tensors.items() if name.startswith(PREFIX)}
        with torch.no_grad():
            for name, weight in self.weights.items():
                weight.copy_(own[name])
        restore_optimizer(self.optimizer, own)

    def save(self, folder: Path) -> None:
        """Write what ``load_backbone`` reads: adapters, or the whole model.

        Adapters then become part of the weights, as they do when loaded: what follows is done by what was saved.
        """
        save_model(self.model, self.backbone, folder)
        if isinstance(self.model, PeftModel):
            self.model.merge_and_unload()
