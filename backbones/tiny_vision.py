"""First lessons for a vision tower that starts from random weights: which answers belong to an image.

Without them the language model learns the questions long before it looks.

Shape legend: B images, N visual tokens, D hidden width, K answers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from backbones.backbone import Backbone


def answer_labels(answers: Sequence[set[str]]) -> Tensor:
    """(images, K) float: which answers, yes and no aside, belong to the questions about an image."""
    words = [own - {"yes", "no"} for own in answers]
    column = {word: place for place, word in enumerate(sorted(set().union(*words)))}
    labels = torch.zeros(len(words), len(column))
    for row, own in enumerate(words):
        labels[row, [column[word] for word in own]] = 1.0
    return labels


def train_vision(
    backbone: Backbone, pixels: Callable[[np.ndarray], Any], labels: Tensor, steps: int, images: int, seed: int
) -> float:
    """Train tower and projector to tell an image's answers; returns the last steps' mean loss.

    An answer is there if any visual token shows it: the logits of the tokens are pooled by log-mean-exp. The head is
    thrown away.

    Args:
        backbone: its tower and projector are trained in place.
        pixels: the processor's batch for some image numbers.
        labels: (images, K) from ``answer_labels``.
        steps: optimiser steps.
        images: B, images a step.
        seed: of the draws.
    """
    head = torch.nn.Linear(backbone.hidden, labels.shape[1])
    towers = backbone.model.model.vision_tower, backbone.model.model.multi_modal_projector
    parameters = [*head.parameters(), *(parameter for tower in towers for parameter in tower.parameters())]
    optimizer = torch.optim.AdamW(parameters, lr=1e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-3, total_steps=max(1, steps))
    recent: list[float] = []
    for step in tqdm(range(steps), desc="vision", unit="step"):
        picked = np.random.default_rng((seed, step, 1)).choice(len(labels), images, replace=len(labels) < images)
        visual_BND = torch.stack(list(backbone.family.features(pixels(picked))))
        logits_BK = head(visual_BND).logsumexp(1) - math.log(visual_BND.shape[1])
        loss = F.binary_cross_entropy_with_logits(logits_BK, labels[torch.from_numpy(picked)])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        recent = [*recent[-49:], loss.item()]
    return sum(recent) / max(1, len(recent))
