"""Train the two-level controller by relaxation (Gumbel straight-through or soft top-k), evaluate it on the test split,
and write a run folder: what ``train_rl.py`` does, with gradients through the model in place of rewards."""

from __future__ import annotations

import dataclasses
import os
import time
from pathlib import Path
from typing import Any, Literal

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch: threads that spin while cores are busy cost tenfold

import numpy as np
import torch
from tqdm import tqdm

from maskgym.backbones import Backbone, EncodingBank
from maskgym.backbones.encodings.left_out import LeftOut
from maskgym.common.determinism import deterministic
from maskgym.common.errors import InputError, queries_named
from maskgym.common.finite import refuse_bad_gradients
from maskgym.common.run_folder import RunFolder
from maskgym.common.stopping import StopSignals
from maskgym.common.tracking import Tracker
from maskgym.envs import load_queries
from maskgym.envs.core import draw_budgets
from maskgym.envs.data.scoring import reference
from maskgym.eval import cli
from maskgym.eval.measure.report import markdown
from maskgym.policies.adallava.scheduler import AdaLlavaConfig, AdaLlavaPlanner, AdaLlavaScheduler
from maskgym.policies.adallava.training import AdaLlavaLearner
from maskgym.policies.controller.decisions import Decider
from maskgym.policies.controller.learned import planner_of
from maskgym.policies.controller.network import TwoLevelController
from maskgym.policies.relaxation.training import Learner, RelaxationSettings, RelaxedBatch, RelaxedLearner
from maskgym.training.checkpoints import (
    load_checkpoint,
    optimizer_tensors,
    random_state,
    restore_optimizer,
    restore_random_state,
    restoring,
    save_checkpoint,
)
from maskgym.training.controller_runs import ControllerRunConfig, RunJournal, conclude, nothing_left
from maskgym.training.loss_scale import LossScale


@dataclasses.dataclass
class GumbelConfig(ControllerRunConfig):
    """Train the controller by relaxation: its decisions become numbers between 0 and 1, through which the answer's loss
    reaches it. The same controller, backbone, queries, cost, projection and evaluation as train_rl.py. Or train
    AdaLLaVA's scheduler, which takes the controller's place."""

    estimator: Literal["gumbel", "soft-topk", "adallava-l", "adallava-h"] = "gumbel"
    """gumbel: keep or drop with Gumbel noise, gradients straight through; soft-topk: sigmoids shifted until the relaxed
    plan costs its budget; adallava-l, adallava-h: exactly as many layers, or groups of
    heads, as the budget pays for, chosen inside the decoder."""
    temperatures: tuple[float, float] | None = None
    """Of the relaxation, at the start and at the end; by default 2 and 0.5 for gumbel, 1 and 0.2 for soft-topk, and 5
    throughout for AdaLLaVA."""
    prefix_layers: int | None = None
    """adallava: layers that always run, before it decides; by default half of them, as published. They bound the
    budgets that can be met from below."""
    head_group: int = 1
    """adallava-h: head slots of a layer that are chosen together (8 of 32 as published)."""
    levels: Literal["flops", "layers"] = "flops"
    """adallava: a budget buys as many units as it pays for; or that share of all layers, as published."""
    noise: float = 1.0
    """soft-topk: standard deviation of Gaussian noise on the logits at the start; it falls to zero. Without it gates
    settle near a half, where they cost little and hide little."""
    fit: bool = True
    """gumbel: project the sampled plans into their budgets in training, as in use."""
    cost: Literal["budget", "penalty"] = "budget"
    """gumbel: price overspending quadratically and unspent budget a little, or every FLOP."""
    cost_weight: float = 1.0
    """gumbel: weight of the price."""
    warm_up: float = 0.2
    """Share of the training in which the price rises to its weight."""
    distillation: float = 0.0
    """Weight of the divergence from the full plan's answer."""
    batch_size: int = 128
    """Queries in a gradient step."""
    out: Path = Path("runs/gumbel")
    """Run folder to make."""

    def check(self) -> None:
        super().check()
        self.check_at_least_one("batch_size")
        low, high = self.budgets
        if not 0 < low <= high <= 1:
            raise InputError(f"budgets are {self.budgets}; give two bounds with 0 < lower <= upper <= 1")
        self.settings()
        if self.estimator == "soft-topk" and self.rule != "fill":
            raise InputError(f"--rule {self.rule} has no effect on soft-topk, whose plans always cost their budgets")
        if self.is_adallava:
            defaults = {field.name: field.default for field in dataclasses.fields(self)}
            for name in IDLE_FOR_ADALLAVA:
                if getattr(self, name) != defaults[name]:
                    option = f"--{name.replace('_', '-')}"
                    raise InputError(f"{option} has no effect on {self.estimator}; leave it out")

    @property
    def is_adallava(self) -> bool:
        return self.estimator.startswith("adallava")

    def settings(self) -> RelaxationSettings:
        names = [field.name for field in dataclasses.fields(RelaxationSettings)]
        given = {name: getattr(self, name) for name in names}
        given["temperatures"] = self.temperatures or TEMPERATURES.get(self.estimator, (5.0, 5.0))
        return RelaxationSettings(**given)


def learner(config: GumbelConfig, backbone: Backbone) -> Learner:
    """What is trained, with fresh weights or those that it shall start from."""
    if config.is_adallava:
        return AdaLlavaLearner(adallava(config, backbone), config.settings())
    sizes = config.sizes(backbone)
    controller = TwoLevelController(sizes)
    weights = config.initial_weights(backbone, sizes)
    if weights is not None:
        controller.load_state_dict(weights)
    return RelaxedLearner(Decider(controller.to(backbone.device), backbone), config.settings())


def adallava(config: GumbelConfig, backbone: Backbone) -> AdaLlavaPlanner:
    """AdaLLaVA's scheduler with fresh weights."""
    layout = backbone.layout
    prefix = layout.layers // 2 if config.prefix_layers is None else config.prefix_layers
    variant = config.estimator.removeprefix("adallava-")
    scheduler = AdaLlavaScheduler(
        AdaLlavaConfig(layout.layers, layout.heads, backbone.hidden, prefix, variant, config.head_group, config.levels)
    )
    last = backbone.prompt_ids("")[1][-1]
    scheduler.start_from(backbone.decoder.model.embed_tokens(torch.tensor(last, device=backbone.device)).float().cpu())
    return AdaLlavaPlanner(scheduler, backbone, config.estimator)


class Trainer:
    """Draws queries and budgets, and follows the gradient.

    Args:
        config: the run's options.
        backbone: gradients pass through it; frozen, unless it is tuned.
        journal: where metrics go.
    """

    def __init__(self, config: GumbelConfig, backbone: Backbone, journal: RunJournal):
        self.config, self.backbone, self.journal = config, backbone, journal
        torch.manual_seed(config.seed)
        np.random.seed(config.seed)
        self.tuning = config.tuning(backbone)
        self.learner = learner(config, backbone)
        self.controller = self.learner.controller
        self.optimizer = torch.optim.Adam(self.controller.parameters(), lr=config.learning_rate)
        refuse_bad_gradients(self.optimizer, self._where)
        self.scale = LossScale(backbone)
        self.bank = EncodingBank(backbone, load_queries(config.data, "train"))
        self.left_out = LeftOut.of(self.bank, self._room, config.max_failed)
        self.queries = 0
        self._recent: list[dict[str, float]] = []

    @property
    def progress(self) -> float:
        return min(1.0, self.queries / self.config.total_queries)

    def draw(self) -> RelaxedBatch:
        """Queries and budgets from NumPy's global generator, whose state is in every checkpoint."""
        some = self.config.batch_size
        numbers = self.left_out.draw(some, lambda places: np.random.randint(len(self.bank), size=len(places)))
        budgets = draw_budgets(np.random, self.config.budgets, some)
        shares = torch.from_numpy(budgets).to(self.backbone.device)
        prompts = self.bank.gather(numbers)
        answers = [self.backbone.answer_ids(reference(accepted)) for accepted in prompts.answers]
        # what stands in the places that the learner wants is replaced by it
        kept_free = [self.backbone.prompt_ids("")[1][-1]] * self.learner.more_tokens
        answered = self.bank.gather(numbers, [kept_free + ids for ids in answers])
        return RelaxedBatch(prompts, answered, answers, shares.maximum(self.learner.least_share(prompts)))

    def _room(self, number: int) -> int:
        """Places behind a query's prompt: the learner's own, and those of the answer to learn."""
        answer = reference(self.bank.source.text(number)[2])
        return self.learner.more_tokens + len(self.backbone.answer_ids(answer))

    def step(self) -> dict[str, float]:
        """One gradient step.

        Raises:
            InputError: a loss, or a gradient, that is not finite; nothing is learnt from it.
        """
        for group in self.optimizer.param_groups:
            group["lr"] = self.config.learning_rate * (1 - self.progress)
        batch = self.draw()
        self._ids = batch.prompts.ids
        parts = self.learner.losses(batch, self.progress)
        weighted = [part for name, part in parts.items() if name in ("answer", "cost", "distillation")]
        loss = torch.stack(weighted).sum()
        if not torch.isfinite(loss):
            raise InputError(
                f"the loss is {loss.item()} {self._where()}; lower --learning-rate "
                f"(now {self.config.learning_rate:g}) or raise the last of --temperatures"
            )
        self.optimizer.zero_grad()
        self.scale.backward(loss)
        self.scale.step(self.optimizer, self.controller.parameters())
        if self.tuning is not None:
            self.tuning.step(self.progress, self.scale)
        self.scale.update(self._where)
        self.queries += self.config.batch_size
        return {"reward": -loss.item(), **{name: part.item() for name, part in parts.items()}}

    def _where(self) -> str:
        return f"after {self.queries} queries, in the next batch ({queries_named(self._ids)})"

    def train(self) -> None:
        """Until ``total_queries`` are answered, or a signal to stop has come."""
        total = self.config.total_queries
        if self.queries >= total:  # resumed after its last checkpoint
            return
        with (
            StopSignals(waits=True) as signals,
            tqdm(total=total, initial=self.queries, desc="train", unit="query") as bar,
        ):
            while self.queries < total:
                signals.obey(self.save)
                if not self._recent:
                    self._between_lines()
                    if self.journal.settling.settled:
                        break
                self._recent.append(self.step())
                bar.update(self.config.batch_size)
                if len(self._recent) == LOG_EVERY or self.queries >= total:
                    means = {name: float(np.mean([line[name] for line in self._recent])) for name in self._recent[0]}
                    bar.set_postfix(answer=f"{means['answer']:.3f}", flops=f"{means['soft_flops']:.2f}")
                    self.journal.write(self.queries, {**means, **self.left_out.metrics()})
                    self._recent = []
            self.journal.validate(self.queries, self.controller)
            self.journal.end(self.queries)
            self.save()

    def cost_gap(self) -> list[tuple[str, str, str]]:
        """What relaxed plans and executed ones cost on the validation split, at the budgets of the final table that can
        be met."""
        planner = planner_of(self.controller, self.backbone, self.config.estimator)
        encoding = self.journal.validation.gather_valid(range(len(self.journal.validation)))[0]
        assert encoding is not None
        full_B = self.backbone.full_llm_flops(encoding)
        rows = [("budget", "relaxed LLM FLOPs %", "executed LLM FLOPs %")]
        least = float(self.learner.least_share(encoding).max())
        for budget in (budget for budget in self.config.test_budgets if budget >= least):
            budgets_B = torch.full_like(full_B, budget, dtype=torch.float64)
            relaxed = self.learner.soft_flops(encoding, budgets_B) / full_B
            plans = planner.plan(encoding, budgets_B)
            executed = self.backbone.cost(encoding, plans, planner.controller_flops(encoding)).llm / full_B
            rows.append((f"{budget:.2f}", f"{100 * relaxed.mean():.1f}", f"{100 * executed.mean():.1f}"))
        return rows

    def _between_lines(self) -> None:
        if self.journal.due_validation(self.queries):
            self.journal.validate(self.queries, self.controller)
        if self.journal.due_checkpoint(self.queries):
            self.save()

    def save(self) -> None:
        """Write a checkpoint of everything that the run's future depends on."""
        random_tensors, random_rest = random_state()
        weights = {f"controller.{name}": value for name, value in self.controller.state_dict().items()}
        tensors = {**weights, **optimizer_tensors(self.optimizer), **random_tensors, **self.scale.tensors()}
        tensors |= {} if self.tuning is None else self.tuning.tensors()
        state = {"queries": self.queries, "recent": self._recent, "random": random_rest, **self.journal.state()}
        state["left_out"] = self.left_out.state()
        save_checkpoint(self.journal.folder.checkpoints, self.queries, tensors, state)

    def restore(self) -> None:
        """Continue from the run's last checkpoint, if it has one."""
        loaded = load_checkpoint(self.journal.folder.checkpoints)
        if loaded is None:
            self.journal.folder.truncate_metrics(0)
            return
        tensors, state = loaded
        with restoring(self.journal.folder.checkpoints):
            prefix = "controller."
            weights: dict[str, Any] = {
                name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)
            }
            self.controller.load_state_dict(weights)
            restore_optimizer(self.optimizer, tensors)
            if self.tuning is not None:
                self.tuning.restore(tensors)
            self.queries, self._recent = state["queries"], state["recent"]
            self.journal.load_state(state)
            if "left_out" in state:  # checkpoints of versions that ended at the first query that failed have none
                self.left_out.load_state(state["left_out"])
            self.scale.restore(tensors)
            restore_random_state(tensors, state["random"])


IDLE_FOR_ADALLAVA = (
    "axes",
    "rule",
    "positions",
    "merge",
    "initial_spread",
    "token_spread",
    "distillation",
    "init_from",
)
"""Options of the two-level controller, and of losses that it alone has."""

TEMPERATURES = {"gumbel": (2.0, 0.5), "soft-topk": (1.0, 0.2)}
"""By estimator; AdaLLaVA's own has 5 throughout."""

LOG_EVERY = 8
"""Gradient steps in a line of metrics; validations and checkpoints fall between lines."""


def main() -> None:
    began = time.time()
    config = cli.parse(GumbelConfig)
    config.check()
    with RunFolder.begun(config.out, config, config.resume) as folder, deterministic(config.deterministic):
        if not nothing_left(config, folder):
            run(config, folder, began)


def run(config: GumbelConfig, folder: RunFolder, began: float) -> None:
    """Train, or finish training, in ``folder``, and evaluate.

    Args:
        config: checked.
        folder: of the run.
        began: time, in seconds.
    """
    tracker = Tracker(config.wandb, folder.path, dataclasses.asdict(config), config.group)
    backbone = config.load_priced()
    trainer = Trainer(config, backbone, RunJournal(config, folder, backbone, tracker, config.estimator))
    if config.resume:
        trainer.restore()
        folder.change_length()
    trainer.journal.say_cuts()
    trainer.train()
    trainer.left_out.say()
    conclude(config, folder, tracker, trainer.controller, backbone, config.estimator, began, trainer.tuning)
    print(f"\ncost of the plans that were trained and of those executed, validation:\n{markdown(trainer.cost_gap())}")


def run_command() -> None:
    """What the shell starts: bad input, signals and full disks end it with one line and a status."""
    cli.run(main, cli.RESUME)
