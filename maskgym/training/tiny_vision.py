"""First lessons for a vision tower that starts from random weights: what is said of an image.

Without them the language model learns the questions long before it looks.

Shape legend: B images, N visual tokens, D hidden width, K words and pairs.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from maskgym.backbones.backbone import Backbone
from maskgym.common.errors import InputError
from maskgym.common.wording import words_and_pairs


def said_labels(said: Sequence[Sequence[tuple[str, str]]], least: float = 0.004, most: float = 0.6) -> Tensor:
    """(images, K) float: which words and pairs of words are said of an image.

    Said are the questions that are not denied, and their answers: "is there a red circle?" speaks of a red circle
    unless the answer is no. It is noisy, for much that is there is not spoken of, but pairs tell which color has which
    shape.

    Args:
        said: of each image, questions and answers.
        least, most: words and pairs count that are said of at least and at most these shares of the images.
    """
    items = [
        {item for question, answer in own if answer != "no" for item in [*words_and_pairs(question), answer]}
        for own in said
    ]
    counts = Counter(item for own in items for item in own)
    kept = sorted(item for item, count in counts.items() if least <= count / len(said) <= most)
    column = {item: place for place, item in enumerate(kept)}
    labels = torch.zeros(len(said), len(column))
    for row, own in enumerate(items):
        labels[row, [column[item] for item in own if item in column]] = 1.0
    return labels


def train_vision(
    backbone: Backbone,
    pixels: Callable[[np.ndarray], tuple[Any, np.ndarray]],
    labels: Tensor,
    steps: int,
    images: int,
    seed: int,
) -> float:
    """Train tower and projector to tell what is said of an image; returns the last steps' mean loss.

    A thing is there if any visual token shows it: the logits of the tokens are pooled by log-mean-exp. The head is
    thrown away.

    Args:
        backbone: its tower and projector are trained in place.
        pixels: the processor's batch for some image numbers, and their numbers, where others stand in for some.
        labels: (images, K) from ``said_labels``.
        steps: optimiser steps.
        images: B, images a step.
        seed: of the draws.

    Raises:
        InputError: a loss that is not finite.
    """
    head, labels = torch.nn.Linear(backbone.hidden, labels.shape[1]).to(backbone.device), labels.to(backbone.device)
    towers = backbone.model.model.vision_tower, backbone.model.model.multi_modal_projector
    parameters = [*head.parameters(), *(parameter for tower in towers for parameter in tower.parameters())]
    optimizer = torch.optim.AdamW(parameters, lr=1e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-3, total_steps=max(1, steps))
    recent: list[float] = []
    for step in tqdm(range(steps), desc="vision", unit="step"):
        picked = np.random.default_rng((seed, step, 1)).choice(len(labels), images, replace=len(labels) < images)
        batch, picked = pixels(picked)
        visual_BND = torch.stack(list(backbone.family.features(batch)))
        logits_BK = head(visual_BND).logsumexp(1) - math.log(visual_BND.shape[1])
        loss = F.binary_cross_entropy_with_logits(logits_BK, labels[torch.from_numpy(picked)])
        if not loss.isfinite():
            raise InputError(f"the vision tower's loss is {loss.item()} at its step {step}; look at the images")
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        recent = [*recent[-49:], loss.item()]
    return sum(recent) / max(1, len(recent))
