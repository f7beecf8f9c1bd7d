"""Make a VLM elastic: train it under random plans, so that dropping tokens, heads or layers costs accuracy gradually.

Two uses: to make the embedded VLM from random weights (the default), and to tune a Hugging Face VLM of a supported
family, in full or with LoRA adapters.
"""

from __future__ import annotations

import dataclasses
import math
import os
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, ClassVar, Literal

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch: threads that spin while cores are busy cost tenfold

import datasets
import numpy as np
import torch
from peft import PeftModel
from transformers import TrainerCallback
from trl.trainer.sft_config import SFTConfig

from maskgym.backbones import Backbone, EncodingBank, InputError, load_backbone
from maskgym.backbones.encodings.left_out import MAX_FAILED, LeftOut, check_max_failed
from maskgym.backbones.families.llava import LlavaFamily
from maskgym.backbones.loading.load import dtype_name, named_dtype, own_dtype
from maskgym.backbones.tiny.build import build_tiny
from maskgym.common.determinism import deterministic
from maskgym.common.run_folder import RunFolder
from maskgym.common.stopping import StopSignals
from maskgym.envs.data.answer_length import say_cuts
from maskgym.envs.data.queries import DatasetQueries, load_queries
from maskgym.envs.data.scoring import reference
from maskgym.eval import cli
from maskgym.eval.answering import Answering
from maskgym.eval.measure.evaluate import evaluate
from maskgym.policies.adapters import lora_config, save_model
from maskgym.policies.baselines import FullPlanner, RandomPlanner
from maskgym.training.elastic import ElasticSettings, ElasticTrainer, checkpoints, step_of
from maskgym.training.muon import MuonAdamW
from maskgym.training.tiny_vision import said_labels, train_vision
from maskgym.training.training_queries import TrainingQueries


@dataclasses.dataclass
class BackboneConfig(Answering):
    """Train a VLM under random plans and save it in Hugging Face format.

    Examples:
      python train_backbone.py --out runs/tiny
      python train_backbone.py --backbone llava-hf/llava-1.5-7b-hf --data my_vqa --lora-rank 64 --images 8 --questions 1
          --steps 2000 --plain-share 0 --learning-rate 1e-4 --dtype bfloat16 --device cuda --out runs/elastic-llava
    """

    backbone: str = "scratch"
    """scratch: the embedded architecture with random weights; else what to tune: tiny, small, a folder or a hub id."""
    data: str = "easy-vqa+scenes"
    """Training data: a name, a path with the columns image, question, answers, or several joined by +."""
    out: Path = Path("runs/tiny")
    """Run folder; the trained model, or its adapters, are saved in its `model/`."""
    lora_rank: int = 0
    """Train LoRA adapters of this rank on the decoder's projections; 0: train all weights."""
    merge: bool = False
    """Save adapters merged into the weights."""
    vision_steps: int = 500
    """From scratch: optimiser steps of the vision tower alone, before the rest."""
    vision_images: int = 128
    """Images in each of them."""
    steps: int = 5400
    """Optimiser steps of the whole model."""
    plain_share: float = 0.6
    """Share of the steps before random plans join."""
    images: int = 64
    """Images a step (on each device)."""
    questions: int = 8
    """Questions an image; with the full plan they share its visual tokens."""
    elastic_questions: int = 1
    """How many of them also run under a random plan, once these have joined."""
    learning_rate: float = 2e-3
    """Peak learning rate of AdamW: linear warm-up, then cosine to zero."""
    muon_rate: float | None = None
    """Peak learning rate of Muon, which then trains the matrices of all layers; 0: AdamW for all. By default 0.004 from
    scratch, else 0. Not for adapters."""
    warmup: int = 100
    """Steps of warm-up."""
    budgets: tuple[float, float] = (0.1, 1.0)
    """Random plans' budgets are uniform between these."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Of the computation, and of the weights but for those that learn, which are float32 until they are saved. auto:
    float32 on the CPU and from scratch; on a GPU the type that the model was saved in, or bfloat16 if its config has
    none."""
    device: Literal["cpu", "cuda"] = "cpu"
    """Where to train; for several GPUs, launch with `accelerate launch train_backbone.py ... --device cuda`."""
    seed: int = 0
    """Of weights, batches and plans."""
    validate_every: int = 200
    """Steps between validations and checkpoints."""
    max_failed: float = MAX_FAILED
    """Share of the queries drawn, in [0, 1), that may fail, for unreadable images, say: they are named, counted, and
    replaced by others. 20 draws always may, unless it is 0."""
    deterministic: bool = False
    """Use only operations that give equal bits each time, and end with an error where there is none."""
    resume: bool = False
    """Continue the run in `out` from its last checkpoint; with other `steps`, for longer: the learning rate, and when
    random plans join, are then as if so many had been asked for at first."""

    LENGTH: ClassVar = "steps"


def check(config: BackboneConfig) -> None:
    """Refuse options that make no sense.

    Raises:
        InputError: naming the option, its value and what it must be.
    """
    config.check_cut()
    check_max_failed("--max-failed", config.max_failed)
    positive = ("steps", "images", "questions", "validate_every", "vision_images")
    rules = [(name, getattr(config, name) >= 1, "at least 1") for name in positive]
    rules += [
        (
            "elastic_questions",
            1 <= config.elastic_questions <= config.questions,
            f"at least 1 and at most --questions ({config.questions})",
        ),
        ("learning_rate", 0 < config.learning_rate < math.inf, "a positive number"),
        ("muon_rate", 0 <= (config.muon_rate or 0) < math.inf, "a number, 0 or more"),
        *((name, getattr(config, name) >= 0, "at least 0") for name in ("lora_rank", "vision_steps", "warmup")),
        ("plain_share", 0 <= config.plain_share <= 1, "between 0 and 1"),
        ("budgets", 0 < config.budgets[0] <= config.budgets[1] <= 1, "two shares with 0 < lower <= upper <= 1"),
    ]
    for name, holds, expected in rules:
        if not holds:
            option = f"--{name.replace('_', '-')}"
            verb = "are" if name == "budgets" else "is"
            raise InputError(f"{option} {verb} {getattr(config, name)}; it must be {expected}")
    if config.lora_rank and config.backbone == "scratch":
        raise InputError("--lora-rank needs a trained model to adapt; name one with --backbone")
    if config.merge and not config.lora_rank:
        raise InputError("--merge has no effect without adapters; leave it out, or give --lora-rank")
    if config.lora_rank and config.muon_rate:
        raise InputError(f"--muon-rate {config.muon_rate:g} has no effect on adapters; leave it out")


def settle_dtype(config: BackboneConfig) -> None:
    """Put what ``auto`` means here in its place, for a config that says what was done.

    Raises:
        InputError: a backbone that cannot be read, or a device that is not there.
    """
    if config.dtype == "auto":
        scratch = config.backbone == "scratch"
        config.dtype = "float32" if scratch else dtype_name(own_dtype(config.backbone, config.device))


def build(config: BackboneConfig, train: DatasetQueries) -> Backbone:
    """The backbone to train. From scratch its vocabulary is the words of the training split."""
    if config.backbone != "scratch":
        kept = torch.float32 if not config.lora_rank else named_dtype(config.dtype)
        backbone = load_backbone(config.backbone, kept, config.device)
        backbone.model.requires_grad_(not config.lora_rank)
        return backbone
    torch.manual_seed(config.seed)
    texts = [text for number in range(len(train)) for text in (train.text(number)[1], *train.text(number)[2])]
    model: Any
    model, processor = build_tiny(texts)
    return Backbone(LlavaFamily(model.to(config.device), processor), "tiny")


def draw(config: BackboneConfig, queries: DatasetQueries, processes: int = 1) -> datasets.Dataset:
    """The images of every step, and which of their questions: the column ``queries``, step after step.

    Of an image's questions, those with rare answers are drawn more often (by the inverse root of the answer's
    frequency): where most answers are yes or no, the model would otherwise learn the questions long before it looks.
    """
    groups = queries.by_image()
    answers = [reference(queries.text(number)[2]) for number in range(len(queries))]
    frequency = Counter(answers)
    weights = np.array([frequency[answer] ** -0.5 for answer in answers])
    chances = [weights[group] / weights[group].sum() for group in groups]
    rows: list[list[int]] = []
    for step in range(config.steps):
        rng = np.random.default_rng((config.seed, step))
        count = config.images * processes
        for group in rng.choice(len(groups), count, replace=len(groups) < count):
            number = min(config.questions, len(groups[group]))
            rows.append(rng.choice(groups[group], number, replace=False, p=chances[group]).tolist())
    return datasets.Dataset.from_dict({"queries": rows})


def prepare_vision(
    config: BackboneConfig, backbone: Backbone, queries: DatasetQueries, drawn: TrainingQueries
) -> float:
    """Train the vision tower alone; returns its loss."""
    groups = queries.by_image()
    group_of = {number: group for group, own in enumerate(groups) for number in own}

    def pixels(picked: np.ndarray) -> tuple[Any, np.ndarray]:
        images, shown = zip(*(drawn.draw(groups[group][:1]) for group in picked), strict=True)
        return backbone.pixels(images), np.array([group_of[number] for (number,) in shown])

    texts = [[queries.text(number) for number in group] for group in groups]
    labels = said_labels([[(question, reference(accepted)) for _, question, accepted in own] for own in texts])
    return train_vision(backbone, pixels, labels, config.vision_steps, config.vision_images, config.seed)


def optimizer(config: BackboneConfig, backbone: Backbone) -> MuonAdamW | None:
    """Muon beside AdamW where it has a rate; None: the trainer's own AdamW."""
    rate = config.muon_rate
    if rate is None:
        rate = 4e-3 if config.backbone == "scratch" else 0.0
    return MuonAdamW(backbone.model.named_parameters(), rate, config.learning_rate) if rate else None


class Journal(TrainerCallback):
    """Validates and writes a line to the run folder whenever the trainer logs."""

    def __init__(
        self,
        folder: RunFolder,
        backbone: Backbone,
        validation: DatasetQueries,
        left_out: LeftOut,
        max_new_tokens: int | None = None,
    ):
        self.folder, self.backbone, self.validation = folder, backbone, validation
        self.left_out, self.max_new_tokens = left_out, max_new_tokens
        self.began = time.time()

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **_: Any) -> None:
        if not state.is_world_process_zero or logs is None or "full" not in logs:
            return
        if "train_runtime" in logs and state.global_step < state.max_steps:  # stopped: the line is not complete
            return
        parts = {name: round(logs[name], 4) for name in ("full", "pruned", "divergence") if name in logs}
        measured = validate(self.backbone, self.validation, self.max_new_tokens) | self.left_out.metrics()
        self.folder.log(step=state.global_step, seconds=round(time.time() - self.began, 1), **parts, **measured)


def validate(
    backbone: Backbone, queries: DatasetQueries, max_new_tokens: int | None = None, limit: int = 1000
) -> dict[str, float]:
    """Validation accuracy of the full plan and of random plans at half and a quarter of the FLOPs, on ``limit`` queries
    spread over the split."""
    training = backbone.model.training
    backbone.model.eval()
    bank = EncodingBank(backbone, queries.spread(limit))
    how: dict[str, Any] = {"max_new_tokens": max_new_tokens, "progress": False}
    full = evaluate(FullPlanner(backbone), backbone, bank, (1.0,), **how)
    pruned = evaluate(RandomPlanner(backbone), backbone, bank, (0.5, 0.25), **how)
    backbone.model.train(training)
    return {
        "accuracy_full": full[0]["accuracy"],
        **{f"accuracy_random_{record['budget']}": record["accuracy"] for record in pruned},
    }


def trainer_options(config: BackboneConfig, folder: RunFolder) -> SFTConfig:
    return SFTConfig(
        output_dir=str(folder.checkpoints),
        max_steps=config.steps,
        per_device_train_batch_size=config.images,
        train_sampling_strategy="sequential",
        learning_rate=config.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=config.warmup,
        adam_beta2=0.98,
        weight_decay=0.05,
        max_grad_norm=1.0,
        logging_steps=config.validate_every,
        save_steps=config.validate_every,
        seed=config.seed,
        use_cpu=config.device == "cpu",
        bf16=config.dtype == "bfloat16",
        fp16=config.dtype == "float16",
        gradient_checkpointing=False,
        ddp_find_unused_parameters=True,
        remove_unused_columns=False,
        dataset_kwargs={"skip_prepare_dataset": True},
        max_length=None,
        report_to="none",
    )


class Stopping(TrainerCallback):
    """A signal to stop is obeyed after a step, with a checkpoint."""

    def __init__(self, signals: StopSignals):
        self.signals = signals

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self.signals.asked is not None:
            control.should_save = control.should_training_stop = True


def main(arguments: Sequence[str] | None = None) -> None:
    config = cli.parse(BackboneConfig, arguments)
    check(config)
    settle_dtype(config)
    out = RunFolder.begun(config.out, config, config.resume) if leads() else nullcontext(RunFolder(config.out))
    with out as folder, deterministic(config.deterministic):
        run(config, folder)


def leads() -> bool:
    """Whether this is the first of the processes that accelerate launches."""
    return os.environ.get("RANK", "0") == "0"


def run(config: BackboneConfig, folder: RunFolder) -> None:
    """Train, or finish training, in ``folder``, and save the model there."""
    first = leads()
    train, validation = (load_queries(config.data, split) for split in ("train", "validation"))
    backbone = build(config, train)
    if first:
        say_cuts(backbone, [validation], config.max_new_tokens)
    drawn = TrainingQueries(backbone, train, config.max_failed, config.seed)
    options = trainer_options(config, folder)
    checkpoint = next(reversed(checkpoints(folder.checkpoints)), None) if config.resume else None
    if first:
        if checkpoint is None:
            folder.truncate_metrics(0)
        else:
            folder.drop_metrics_after(step_of(checkpoint))
        folder.change_length()
    if checkpoint is None and config.backbone == "scratch" and config.vision_steps:
        began = time.time()
        loss = prepare_vision(config, backbone, train, drawn)
        if first:
            folder.log(vision_loss=round(loss, 5), seconds=round(time.time() - began, 1))
    signals = StopSignals(waits=True)
    trainer = ElasticTrainer(
        backbone,
        drawn,
        draw(config, train, options.world_size),
        ElasticSettings(
            round(config.plain_share * config.steps), config.elastic_questions, config.budgets, config.seed
        ),
        options,
        lora_config(backbone, config.lora_rank) if config.lora_rank else None,
        optimizers=(optimizer(config, backbone), None),
        callbacks=[Journal(folder, backbone, validation, drawn.left_out, config.max_new_tokens), Stopping(signals)],
    )
    with signals:
        trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    drawn.left_out.say()
    if trainer.is_world_process_zero():
        save(config, folder, trainer, backbone)


def save(config: BackboneConfig, folder: RunFolder, trainer: ElasticTrainer, backbone: Backbone) -> None:
    """Write what ``load_backbone`` and ``from_pretrained`` read: the model, or its adapters."""
    model: Any = trainer.accelerator.unwrap_model(trainer.model)
    if config.lora_rank and config.merge:
        model = model.merge_and_unload()
    if not isinstance(model, PeftModel):
        model = model.to(named_dtype(config.dtype))
    save_model(model, backbone, folder.model)


def run_command() -> None:
    """What the shell starts: bad input, signals and full disks end it with one line and a status."""
    cli.run(main, cli.RESUME)
