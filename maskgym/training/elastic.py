"""Elastic training: a VLM learns to answer under random plans, so that dropping parts costs accuracy gradually.

As AdaLLaVA (Xu et al., ICCV 2025) tunes its language model under random schedules, but in all three dimensions, and
with what is dropped really absent. All queries run in full, some also under a random plan: both learn the answer, and
the pruned run also learns the full run's distribution (in-place distillation; Yu and Huang, ICCV 2019).

Shape legend: R queries of a batch, T their answers' tokens, E those of the queries that also run pruned, V vocabulary.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from itertools import compress
from pathlib import Path
from typing import Any

import datasets
import torch
import torch.nn.functional as F
from peft import LoraConfig, PeftModel
from torch import Tensor, nn
from transformers import ProcessorMixin
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_callback import TrainerState
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from trl.trainer.sft_config import SFTConfig
from trl.trainer.sft_trainer import SFTTrainer

from maskgym.backbones.backbone import Backbone
from maskgym.backbones.encodings.encoding import EncodedImage
from maskgym.backbones.executed import executed_answer_logits
from maskgym.backbones.plans.masks import Masks
from maskgym.backbones.plans.survivors import RESTORED, Survivors
from maskgym.backbones.shared_prefix import answer_logits, can_share
from maskgym.common.atomic import UNFINISHED, put_in_place, remove_at_once
from maskgym.common.errors import InputError, queries_named
from maskgym.common.finite import refuse_bad_gradients
from maskgym.common.plain_files import read_json
from maskgym.policies.baselines import random_waits
from maskgym.policies.planning.projection import least_share, project
from maskgym.training.checkpoints import reading_newest
from maskgym.training.coherent import RESTORED_SHARE, SHARPNESS, reorder_tokens
from maskgym.training.loss_scale import FIRST, check_scale
from maskgym.training.training_queries import TrainingQueries

KEPT = 2
"""Checkpoints that are kept: the newest, and the one before."""

LEFT_OUT = "left-out.json"
"""File of a checkpoint: which queries were left out so far, and of how many."""

UNLOGGED = "unlogged.json"
"""File of a checkpoint: the parts of the loss, step by step, since the last line of metrics."""


@dataclass(frozen=True)
class ElasticSettings:
    """What an elastic training does beyond a plain one.

    Attributes:
        plain_steps: steps with the full plan only, before random plans join.
        questions: of an image; so many run under a random plan as well, once these have joined.
        budgets: random plans' budgets are uniform between these.
        seed: of the plans.
    """

    plain_steps: int = 0
    questions: int = 1
    budgets: tuple[float, float] = (0.1, 1.0)
    seed: int = 0


class Collator:
    """Rows that number the queries of an image, made into a batch: pixels, questions, answers' ids.

    Args:
        drawn: the queries, numbered by the rows' ``queries``; those of a row show the same image.
    """

    def __init__(self, drawn: TrainingQueries):
        self.drawn = drawn

    def __call__(self, rows: Sequence[dict[str, list[int]]]) -> dict[str, Any]:
        images, numbers = zip(*(self.drawn.draw(row["queries"]) for row in rows), strict=True)
        texts = [[self.drawn.queries.text(number) for number in own] for own in numbers]
        return {
            "pixels": dict(self.drawn.backbone.pixels(images)),
            "questions": [[question for _, question, _ in row] for row in texts],
            "answers": [[self.drawn.answer(number) for number in own] for own in numbers],
            "ids": [id for row in texts for id, _, _ in row],
        }


class ElasticTrainer(SFTTrainer):
    """TRL's supervised fine-tuning of a VLM, with the next-token loss taken under random plans.

    Batches, optimiser, schedule, adapters, several processes (Accelerate) and checkpoints are TRL's; the loss is ours.

    Args:
        backbone: trained in place.
        drawn: the queries that the draws number.
        draws: one row an image and step, in order, with the column ``queries``.
        settings: plain steps, budgets, seed.
        args: TRL's.
        peft_config: train adapters (``maskgym.policies.adapters.lora_config``) and leave the weights; without it, all
            weights.
        **options: of ``SFTTrainer``.
    """

    def __init__(
        self,
        backbone: Backbone,
        drawn: TrainingQueries,
        draws: datasets.Dataset,
        settings: ElasticSettings,
        args: SFTConfig,
        peft_config: LoraConfig | None = None,
        **options: Any,
    ):
        self.backbone, self.settings, self.left_out = backbone, settings, drawn.left_out
        processor = backbone.processor
        super().__init__(
            model=backbone.model,
            args=args,
            data_collator=Collator(drawn),
            train_dataset=draws,
            processing_class=processor if isinstance(processor, ProcessorMixin) else processor.tokenizer,
            peft_config=peft_config,
            **options,
        )
        # Several processes synchronise gradients in the wrapped model's forward, so the losses must be computed there.
        # For a narrow type Accelerate would bind a method to the model anew.
        backbone.model.forward = partial(self.losses)
        if args.fp16 and self.accelerator.device.type == "cpu":  # which Accelerate takes for no place for float16
            self.accelerator.native_amp, self.accelerator.scaler = True, torch.amp.GradScaler("cpu", init_scale=FIRST)

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The sum of the parts; each part is logged.

        Raises:
            InputError: a sum that is not finite.
        """
        step = self.state.global_step
        plans_from = None if step < self.settings.plain_steps else step
        self._ids = inputs["ids"]
        parts = model(**{name: value for name, value in inputs.items() if name != "ids"}, plans_from=plans_from)
        total = torch.stack(list(parts.values())).sum()
        if self.accelerator.scaler is not None:
            check_scale(self.accelerator.scaler, self._where)
        if not torch.isfinite(total):
            rate = f"lower --learning-rate (now {self.args.learning_rate:g})"
            raise InputError(f"the loss is {total.item()} {self._where()}; {rate}")
        for name, part in parts.items():
            self._metrics["train"][name].append(part.item())
        return (total, parts) if return_outputs else total

    def _where(self) -> str:
        return f"at step {self.state.global_step} ({queries_named(self._ids)})"

    def create_optimizer(self, *arguments: Any) -> torch.optim.Optimizer:
        """TRL's, or the one given, which takes no step along gradients that are not finite."""
        optimizer = super().create_optimizer(*arguments)
        refuse_bad_gradients(optimizer, self._where)
        return optimizer

    def _get_output_dir(self, trial: Any) -> str:
        """Where checkpoints are written before they take their places."""
        return str(self._folder / UNFINISHED)

    @property
    def _folder(self) -> Path:
        return Path(str(self.args.output_dir))

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """As the trainer writes it, with the parts of the loss that no line has shown yet; but a crash leaves all of a
        checkpoint or nothing."""
        checkpoint = f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        written, place = Path(self._get_output_dir(trial), checkpoint), self._folder / checkpoint
        if self.is_world_process_zero():
            shutil.rmtree(written.parent, ignore_errors=True)
        self.accelerator.wait_for_everyone()
        super()._save_checkpoint(model, trial)
        self.accelerator.wait_for_everyone()
        if self.is_world_process_zero():
            (written / UNLOGGED).write_text(json.dumps(self._metrics["train"]), encoding="utf-8")
            (written / LEFT_OUT).write_text(json.dumps(self.left_out.state()), encoding="utf-8")
            put_in_place(written, place)
            for old in checkpoints(self._folder)[:-KEPT]:
                remove_at_once(old)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        """Weights as ``from_pretrained`` reads them: the trainer itself takes the file's names for the model's own, and
        Hugging Face keeps the names of older releases in files."""
        model = self.model if model is None else model
        with self._reading(resume_from_checkpoint) as checkpoint:
            TrainerState.load_from_json(str(checkpoint / TRAINER_STATE_NAME))
            self._metrics["train"].update(read_json(checkpoint / UNLOGGED))
            if (checkpoint / LEFT_OUT).exists():  # versions that ended at the first query that failed wrote none
                self.left_out.load_state(read_json(checkpoint / LEFT_OUT))
            if isinstance(model, PeftModel):
                super()._load_from_checkpoint(resume_from_checkpoint, model)
            else:
                how = {"dtype": model.dtype, "use_safetensors": True}
                stored = type(model).from_pretrained(resume_from_checkpoint, **how)
                model.load_state_dict(stored.state_dict())

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """With the rates of this schedule: those that the optimiser had may be of one for other steps."""
        with self._reading(checkpoint):
            super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None:
            schedule: Any = self.lr_scheduler
            rates = zip(schedule.base_lrs, schedule.lr_lambdas, strict=True)
            for group, (peak, share) in zip(schedule.optimizer.param_groups, rates, strict=True):
                group["lr"] = peak * share(schedule.last_epoch)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        with self._reading(checkpoint):
            super()._load_rng_state(checkpoint)

    def _reading(self, checkpoint: str | None) -> AbstractContextManager[Path]:
        """What the trainer itself says of a checkpoint that cannot be read helps nobody."""
        return nullcontext(Path()) if checkpoint is None else reading_newest(checkpoints(Path(checkpoint).parent))

    def floating_point_ops(self, inputs: Any) -> int:
        """Not estimated: Hugging Face's rule of thumb knows nothing of plans."""
        return 0

    def losses(
        self,
        pixels: dict[str, Tensor],
        questions: list[list[str]],
        answers: list[list[list[int]]],
        plans_from: int | None,
    ) -> dict[str, Tensor]:
        """The parts of a batch's loss.

        Args:
            pixels: the processor's batch of images.
            questions: of each image.
            answers: of each question, as ids.
            plans_from: the step whose random plans join; None: the full plan only.
        """
        features = self.backbone.family.features(pixels)
        encoded = self.backbone.read_batch(pixels, features)
        end = self.backbone.processor.tokenizer.eos_token_id
        rows = AnsweredRows(
            [image for image, row in zip(encoded, questions, strict=True) for _ in row],
            [question for row in questions for question in row],
            [ids for row in answers for ids in row],
        )
        targets_T = torch.tensor([token for ids in rows.answers for token in [*ids, end]], device=features[0].device)
        if can_share(self.backbone):
            full_TV = answer_logits(self.backbone, encoded, questions, answers)
        else:
            full_TV = rows.logits(self.backbone, self.backbone.layout.full(len(rows.images), targets_T.device))
        parts = {"full": F.cross_entropy(full_TV, targets_T)}
        if plans_from is None:
            return parts
        pruned_R = [number < self.settings.questions for row in questions for number in range(len(row))]
        pruned_T = torch.tensor(pruned_R, device=targets_T.device).repeat_interleave(
            torch.tensor([len(ids) + 1 for ids in rows.answers], device=targets_T.device)
        )
        pruned = rows.where(pruned_R)
        with torch.no_grad():
            plans = self._random_plans(pruned, plans_from)
        pruned_EV = pruned.logits(self.backbone, plans)
        return parts | pruned_losses(pruned_EV, full_TV[pruned_T], targets_T[pruned_T])

    def _random_plans(self, rows: AnsweredRows, step: int) -> Masks:
        """A plan a row at a random budget (the smallest plan where that costs more), with original or restored
        positions; they follow from the seed, the step and the process."""
        settings = self.settings
        seed = (settings.seed * 1_000_003 + step) * 1_009 + self.accelerator.process_index
        generator = torch.Generator().manual_seed(seed)
        low, high = settings.budgets
        budgets_B = low + (high - low) * torch.rand(len(rows.images), generator=generator, dtype=torch.float64)
        encoding = self.backbone.assemble(rows.images, rows.questions)
        least_B = least_share(self.backbone, encoding).cpu()
        waits_BA = random_waits(self.backbone, len(encoding), generator, sharpness=SHARPNESS)
        waits_BA = reorder_tokens(waits_BA, encoding, generator)
        device = encoding.visual_BND.device
        restored_B = (torch.rand(len(encoding), generator=generator) < RESTORED_SHARE).to(device)
        layout = Survivors.plain(len(encoding), device=device)
        layout = replace(layout, positions=RESTORED * restored_B, merged=restored_B)
        plans = replace(self.backbone.full(encoding), survivors=layout)
        return project(self.backbone, plans, waits_BA.to(device), budgets_B.maximum(least_B).to(device), encoding)


def checkpoints(folder: Path) -> list[Path]:
    """Those that ``ElasticTrainer`` has written, the newest last."""
    return sorted(folder.glob(f"{PREFIX_CHECKPOINT_DIR}-*"), key=step_of)


def step_of(checkpoint: Path) -> int:
    """At which it was written."""
    return int(checkpoint.name.split("-")[1])


@dataclass(frozen=True)
class AnsweredRows:
    """Queries with the ids of their answers, one sequence each."""

    images: list[EncodedImage]
    questions: list[str]
    answers: list[list[int]]

    def where(self, chosen: Sequence[bool]) -> AnsweredRows:
        """Some of the rows."""
        return AnsweredRows(
            list(compress(self.images, chosen)),
            list(compress(self.questions, chosen)),
            list(compress(self.answers, chosen)),
        )

    def logits(self, backbone: Backbone, masks: Masks) -> Tensor:
        """Logits (T, V) at the places that predict each answer's tokens and its end, under a plan a row."""
        encoding = backbone.assemble(self.images, self.questions, continuations=self.answers)
        return executed_answer_logits(backbone, encoding, masks, self.answers)


def pruned_losses(pruned_EV: Tensor, full_EV: Tensor, targets_E: Tensor) -> dict[str, Tensor]:
    """The pruned runs' cross-entropy, and their divergence from the full ones, which take no gradient from it."""
    teacher_EV = full_EV.detach().log_softmax(-1)
    return {
        "pruned": F.cross_entropy(pruned_EV, targets_E),
        "divergence": F.kl_div(pruned_EV.log_softmax(-1), teacher_EV, reduction="batchmean", log_target=True),
    }
