"""Train the embedded VLM: its vision tower, then all of it plainly, then under random plans so that it degrades
gradually.

The tower comes first, as LLaVA's does: it learns which answers belong to an image. Then the whole model learns the
task with the full plan. In the last part every query runs twice in one batch, once in
full and once under a random plan that is really executed; the pruned row learns the answer and the full row's
distribution.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from backbones import Backbone, EncodingBank, InputError
from backbones.encoding import EncodedImage, Encoding
from backbones.families.llava import LlavaFamily
from backbones.masks import Masks
from backbones.tiny import build_tiny
from envs.queries import DatasetQueries, load_queries
from envs.scoring import reference
from eval import cli
from eval.evaluate import evaluate
from eval.runs import RunFolder
from policies.baselines import FullPlanner, RandomPlanner, random_plans
from policies.checkpoints import load_checkpoint, optimizer_tensors, restore_optimizer, save_checkpoint


@dataclasses.dataclass
class BackboneConfig:
    """Train the embedded VLM (`tiny`) from random weights and save it in Hugging Face format."""

    data: str = "easy-vqa"
    """Training data: a name, or a path with the columns image, question, answers."""
    out: Path = Path("runs/tiny")
    """Run folder; the trained model is saved in its `model/`."""
    vision_steps: int = 600
    """Optimiser steps of the vision tower alone, before the rest."""
    vision_images: int = 128
    """Images in each of them."""
    steps: int = 1000
    """Optimiser steps of the whole model."""
    plain_share: float = 0.75
    """Share of the steps before random plans join."""
    images: int = 96
    """Images a step; half as many once random plans join, since every query then runs twice."""
    questions: int = 2
    """Questions an image a step."""
    learning_rate: float = 2e-3
    """Peak learning rate: linear warm-up, then cosine to zero."""
    warmup: int = 100
    """Steps of warm-up."""
    budgets: tuple[float, float] = (0.1, 1.0)
    """Random plans' budgets are uniform between these."""
    seed: int = 0
    """Of weights, batches, augmentation and plans."""
    validate_every: int = 125
    """Steps between validations and checkpoints."""
    resume: bool = False
    """Continue the run in `out` from its last checkpoint."""


RandomPlan = Callable[[Encoding], Masks]


class Batches:
    """Training batches: images with several of their questions each, images flipped at random.

    Of an image's questions, those with rare answers are drawn more often (by the inverse root of the answer's
    frequency): where most answers are yes or no, the model would otherwise learn the questions long before it looks.

    Args:
        queries: the training split.
        backbone: its processor prepares the images, once.
        seed: of the draws; with a step number it fixes a batch, so training resumes exactly.
    """

    def __init__(self, queries: DatasetQueries, backbone: Backbone, seed: int):
        self.queries, self.seed = queries, seed
        questions_of: dict[Any, list[int]] = {}
        for number in range(len(queries)):
            questions_of.setdefault(queries.image_key(number), []).append(number)
        self.groups = list(questions_of.values())
        answers = [reference(queries.text(number)[2]) for number in range(len(queries))]
        frequency = Counter(answers)
        weights = np.array([frequency[answer] ** -0.5 for answer in answers])
        self.chances = [weights[group] / weights[group].sum() for group in self.groups]
        images = [queries[group[0]].image for group in tqdm(self.groups, desc="images", unit="image")]
        self.pixels = backbone.processor.image_processor(images, return_tensors="pt")["pixel_values"]
        self.backbone = backbone
        self.template = backbone.encode_images(images[:1])[0]

    def labels(self) -> Tensor:
        """(images, answers) float: which answers, yes and no aside, belong to an image's questions."""
        words = [{reference(self.queries.text(number)[2]) for number in group} - {"yes", "no"} for group in self.groups]
        column = {word: place for place, word in enumerate(sorted(set().union(*words)))}
        labels = torch.zeros(len(words), len(column))
        for row, own in enumerate(words):
            labels[row, [column[word] for word in own]] = 1.0
        return labels

    def draw_images(self, rng: np.random.Generator, images: int) -> tuple[np.ndarray, Tensor]:
        """Image numbers (images,) and their pixels (images, C, H, W), flipped at random."""
        picked = rng.choice(len(self.groups), size=images, replace=False)
        pixels = self.pixels[torch.from_numpy(picked)]
        for axis in (2, 3):
            flip = torch.from_numpy(rng.random(images) < 0.5)
            pixels[flip] = pixels[flip].flip(axis)
        return picked, pixels

    def encode(self, pixels: Tensor) -> list[EncodedImage]:
        """Encoded images, differentiable."""
        features = self.backbone.family.features({"pixel_values": pixels})
        return [dataclasses.replace(self.template, visual_nD=visual_nD) for visual_nD in features]

    def draw(self, step: int, images: int, questions: int) -> tuple[Tensor, list[int]]:
        """Pixels (images, C, H, W) and images * questions query numbers, image by image."""
        rng = np.random.default_rng((self.seed, step))
        picked, pixels = self.draw_images(rng, images)
        chosen = [rng.choice(self.groups[group], size=questions, p=self.chances[group]) for group in picked]
        return pixels, np.concatenate(chosen).tolist()


def train_vision(config: BackboneConfig, backbone: Backbone, batches: Batches) -> float:
    """Train tower and projector to tell which answers belong to an image, from the mean visual token; returns the last
    steps' mean loss. The head is thrown away."""
    labels = batches.labels()
    head = torch.nn.Linear(backbone.hidden, labels.shape[1])
    towers = backbone.model.model.vision_tower, backbone.model.model.multi_modal_projector
    parameters = [*head.parameters(), *(parameter for tower in towers for parameter in tower.parameters())]
    optimizer = torch.optim.AdamW(parameters, lr=1e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-3, total_steps=config.vision_steps)
    recent: list[float] = []
    for step in tqdm(range(config.vision_steps), desc="vision", unit="step"):
        picked, pixels = batches.draw_images(np.random.default_rng((config.seed, step, 1)), config.vision_images)
        logits = head(torch.stack([image.visual_nD.mean(0) for image in batches.encode(pixels)]))
        loss = F.binary_cross_entropy_with_logits(logits, labels[torch.from_numpy(picked)])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        recent = [*recent[-49:], loss.item()]
    return sum(recent) / max(1, len(recent))


def losses(
    backbone: Backbone, batches: Batches, pixels: Tensor, numbers: list[int], plan: RandomPlan | None
) -> dict[str, Tensor]:
    """Next-token loss of the full plan, and with ``plan`` also the pruned rows' loss and divergence from the full."""
    texts = [batches.queries.text(number) for number in numbers]
    end = backbone.processor.tokenizer.eos_token_id
    answers = [backbone.answer_ids(reference(accepted)) for _, _, accepted in texts]
    images = [image for image in batches.encode(pixels) for _ in range(len(numbers) // len(pixels))]
    questions = [question for _, question, _ in texts]
    encoding = backbone.assemble(images, questions, continuations=answers)
    masks = backbone.full(encoding)
    if plan is not None:
        plans = plan(backbone.assemble(images, questions))
        encoding = encoding.rows(torch.arange(2 * len(numbers)) % len(numbers))
        masks, answers = Masks.cat([masks, plans]), answers * 2
    x_PD, ragged, rope_PR = backbone.pack(encoding, masks)
    hidden_PD, _ = backbone.decoder.prefill(x_PD, ragged, rope_PR, masks)
    places = torch.cat([last - torch.arange(len(ids), -1, -1) for last, ids in zip(ragged.last, answers, strict=True)])
    targets = torch.tensor([token for ids in answers for token in [*ids, end]])
    logits = backbone.model.lm_head(hidden_PD[places])
    if plan is None:
        return {"full": F.cross_entropy(logits, targets)}
    full, pruned = logits.chunk(2)
    teacher = full.detach().log_softmax(-1)
    return {
        "full": F.cross_entropy(full, targets.chunk(2)[0]),
        "pruned": F.cross_entropy(pruned, targets.chunk(2)[1]),
        "divergence": F.kl_div(pruned.log_softmax(-1), teacher, reduction="batchmean", log_target=True),
    }


def elastic_plans(config: BackboneConfig, backbone: Backbone, step: int, encoding: Encoding) -> Masks:
    """A random plan a row, at a random budget."""
    generator = torch.Generator().manual_seed(config.seed * 1_000_003 + step)
    low, high = config.budgets
    budgets = low + (high - low) * torch.rand(len(encoding), generator=generator, dtype=torch.float64)
    return random_plans(backbone, encoding, budgets, generator)


def learning_rate(config: BackboneConfig, step: int) -> float:
    rise = min(1.0, (step + 1) / max(1, config.warmup))
    return config.learning_rate * rise * 0.5 * (1 + math.cos(math.pi * step / config.steps))


def build(config: BackboneConfig, train: DatasetQueries) -> Backbone:
    """The embedded architecture with random weights; its vocabulary is the words of the training split."""
    torch.manual_seed(config.seed)
    texts = [text for number in range(len(train)) for text in (train.text(number)[1], *train.text(number)[2])]
    return Backbone(LlavaFamily(*build_tiny(texts)), "tiny")


def train_step(
    config: BackboneConfig, backbone: Backbone, batches: Batches, optimizer: torch.optim.Optimizer, step: int
) -> dict[str, float]:
    """One optimiser step; returns the parts of the loss."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate(config, step)
    elastic = step >= config.plain_share * config.steps
    pixels, numbers = batches.draw(step, config.images // (1 + elastic), config.questions)
    plan = partial(elastic_plans, config, backbone, step) if elastic else None
    backbone.model.train()
    parts = losses(backbone, batches, pixels, numbers, plan)
    total = torch.stack(list(parts.values())).sum()
    if not torch.isfinite(total):
        raise InputError(
            f"the loss is {total.item()} at step {step}; lower --learning-rate (now {config.learning_rate:g})"
        )
    optimizer.zero_grad()
    total.backward()
    torch.nn.utils.clip_grad_norm_(backbone.model.parameters(), 1.0)
    optimizer.step()
    backbone.model.eval()
    return {name: part.item() for name, part in parts.items()}


def save(folder: RunFolder, model: Any, optimizer: torch.optim.Optimizer, step: int) -> None:
    tensors = {f"model.{name}": value for name, value in model.state_dict().items()}
    save_checkpoint(folder.checkpoints, step, {**tensors, **optimizer_tensors(optimizer)}, {"step": step}, keep=1)


def restore(folder: RunFolder, model: Any, optimizer: torch.optim.Optimizer) -> int:
    """Continue from the run's checkpoint, if it has one; returns the next step."""
    loaded = load_checkpoint(folder.checkpoints)
    if loaded is None:
        return 0
    tensors, state = loaded
    model.load_state_dict({key[6:]: value for key, value in tensors.items() if key.startswith("model.")})
    restore_optimizer(optimizer, tensors)
    return state["step"]


def main() -> None:
    config = cli.parse(BackboneConfig)
    folder = RunFolder.create(config.out, config, config.resume)
    train, validation = (load_queries(config.data, split) for split in ("train", "validation"))
    backbone = build(config, train)
    optimizer = torch.optim.AdamW(backbone.model.parameters(), betas=(0.9, 0.98), weight_decay=0.05)
    start = restore(folder, backbone.model, optimizer) if config.resume else 0
    batches = Batches(train, backbone, config.seed)
    began = time.time()
    if start == 0:
        folder.log(vision_loss=round(train_vision(config, backbone, batches), 5), seconds=round(time.time() - began, 1))
    for step in tqdm(range(start, config.steps), initial=start, total=config.steps, desc="train", unit="step"):
        parts = train_step(config, backbone, batches, optimizer, step)
        if (step + 1) % config.validate_every == 0 or step + 1 == config.steps:
            measured = {name: round(part, 4) for name, part in parts.items()} | validate(backbone, validation)
            folder.log(step=step + 1, seconds=round(time.time() - began, 1), **measured)
            tqdm.write(str(folder.metrics()[-1]))
            save(folder, backbone.model, optimizer, step + 1)
    backbone.model.save_pretrained(folder.path / "model")
    backbone.processor.save_pretrained(folder.path / "model")


def validate(backbone: Backbone, queries: DatasetQueries, limit: int = 1000) -> dict[str, float]:
    """Validation accuracy of the full plan and of random plans at half and a quarter of the FLOPs."""
    bank = EncodingBank(backbone, queries.head(limit))
    full = evaluate(FullPlanner(backbone), backbone, bank, (1.0,), progress=False)
    pruned = evaluate(RandomPlanner(backbone), backbone, bank, (0.5, 0.25), progress=False)
    return {
        "accuracy_full": full[0]["accuracy"],
        **{f"accuracy_random_{record['budget']}": record["accuracy"] for record in pruned},
    }


if __name__ == "__main__":
    cli.run(main)
