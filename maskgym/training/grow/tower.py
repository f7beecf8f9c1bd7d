"""The phase of lessons: vision tower and projector alone."""

from __future__ import annotations

import time

import numpy as np
import torch
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

from maskgym.backbones.small.build import VISION
from maskgym.training.grow.lessons import Lessons
from maskgym.training.grow.model import Vision, save_shards, vision_tensors
from maskgym.training.grow.run import LESSON_WORDS, WEIGHTS, GrowConfig, Run, batches, rate_at, step_along
from maskgym.training.muon import MuonAdamW

MUON_RATE, ADAMW_RATE = 4e-3, 1e-3
"""After 55 steps of 32 images Muon's tower told 80 % of the colours, AdamW's 20 %."""


def untrained_vision(seed: int, hidden: int) -> Vision:
    """Tower and projector with random weights, for a language model of such a width, which is not there."""
    torch.manual_seed(seed)
    text = LlamaConfig(
        vocab_size=8, hidden_size=hidden, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1
    )
    config = LlavaConfig(vision_config=CLIPVisionConfig(**VISION), text_config=text)
    return Vision(LlavaForConditionalGeneration(config))


def tower(given: GrowConfig) -> None:
    """Give the lessons."""
    run = Run(given)
    with np.load(given.out / LESSON_WORDS, allow_pickle=False) as stored:
        words_KD, loudness = torch.from_numpy(stored["words"]), float(stored["loudness"])
    vision, lessons = untrained_vision(given.seed, words_KD.shape[1]), Lessons(words_KD)
    vision.to(given.device)
    lessons.to(given.device)
    named = [*vision.named_parameters(), *lessons.named_parameters()]
    optimizer = MuonAdamW(named, MUON_RATE, ADAMW_RATE)
    for group in optimizer.param_groups:
        group["peak"] = group["lr"]
    parameters, shown = [parameter for _, parameter in named], time.time()
    drawn = batches(given, 0, given.images, given.seed, given.workers)
    batch, step = next(drawn), 0
    run.start()
    while (progress := run.progress(step)) < 1:
        loss, right = lessons(vision(batch.pixels), batch.lessons)
        step_along(optimizer, loss, parameters, rate_at(progress, 0.05, 0.5))
        step += 1
        if time.time() - shown > 10 or step in (1, 10, 100):
            shown = time.time()
            run.log(step=step, loss=round(loss.item(), 4), right=[round(x, 3) for x in right.tolist()])
        batch = next(drawn)
    vision.scale_to(loudness, batch.pixels)
    save_shards(vision_tensors(vision), given.out / WEIGHTS)
    loss, right = lessons(vision(batch.pixels), batch.lessons)
    run.log(step=step, loss=round(loss.item(), 4), right=[round(x, 3) for x in right.tolist()], ended=True)
