"""Train the two-level controller by relaxation (Gumbel straight-through or soft top-k), evaluate it on the test split,
and write a run folder: what ``train_rl.py`` does, with gradients through the model in place of rewards."""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from tqdm import tqdm

from backbones import Backbone, EncodingBank
from backbones.errors import InputError
from envs import load_queries
from envs.scoring import reference
from eval import cli
from eval.controller_runs import ControllerRunConfig, RunJournal, conclude
from eval.runs import RunFolder
from eval.tracking import Tracker
from policies.checkpoints import (
    load_checkpoint,
    optimizer_tensors,
    random_state,
    restore_optimizer,
    restore_random_state,
    save_checkpoint,
)
from policies.controller import TwoLevelController
from policies.decisions import Decider
from policies.projection import least_share
from policies.relaxed_training import RelaxationSettings, RelaxedBatch, relaxed_losses


@dataclasses.dataclass
class GumbelConfig(ControllerRunConfig):
    """Train the controller by relaxation: its decisions become numbers between 0 and 1, through which the answer's loss
    reaches it. The same controller, backbone, queries, cost, projection and evaluation as train_rl.py."""

    estimator: Literal["gumbel", "soft-topk"] = "gumbel"
    """gumbel: keep or drop with Gumbel noise, gradients straight through; soft-topk: sigmoids shifted until the relaxed
    plan costs its budget (always with the rule `fill`)."""
    temperatures: tuple[float, float] = (2.0, 0.5)
    """Of the relaxation, at the start and at the end."""
    noise: float = 0.0
    """soft-topk: standard deviation of Gaussian noise on the logits at the start; it falls to zero."""
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
    initial_logit: float = 2.0
    """Keep-logit of every unit before training: the controller starts near full capacity."""
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

    def settings(self) -> RelaxationSettings:
        names = [field.name for field in dataclasses.fields(RelaxationSettings)]
        return RelaxationSettings(**{name: getattr(self, name) for name in names})


class Trainer:
    """Draws queries and budgets, and follows the gradient.

    Args:
        config: the run's options.
        backbone: frozen; gradients pass through it.
        journal: where metrics go.
    """

    def __init__(self, config: GumbelConfig, backbone: Backbone, journal: RunJournal):
        self.config, self.backbone, self.journal = config, backbone, journal
        torch.manual_seed(config.seed)
        np.random.seed(config.seed)
        rule = "fill" if config.estimator == "soft-topk" else config.rule
        sizes = config.sizes(backbone, rule=rule, initial_logit=config.initial_logit)
        self.controller = TwoLevelController(sizes)
        weights = config.initial_weights(backbone, sizes)
        if weights is not None:
            self.controller.load_state_dict(weights)
        self.controller.to(backbone.device)
        self.decider = Decider(self.controller, backbone)
        self.optimizer = torch.optim.Adam(self.controller.parameters(), lr=config.learning_rate)
        self.bank = EncodingBank(backbone, load_queries(config.data, "train"))
        self.settings = config.settings()
        self.queries = 0

    @property
    def progress(self) -> float:
        return min(1.0, self.queries / self.config.total_queries)

    def draw(self) -> RelaxedBatch:
        """Queries and budgets from NumPy's global generator, whose state is in every checkpoint."""
        numbers = np.random.randint(len(self.bank), size=self.config.batch_size)
        low, high = self.config.budgets
        shares = torch.from_numpy(np.random.uniform(low, high, self.config.batch_size)).to(self.backbone.device)
        prompts = self.bank.gather(numbers)
        answers = [self.backbone.answer_ids(reference(accepted)) for accepted in prompts.answers]
        flops = self.decider.controller_flops(prompts)
        least_B = least_share(self.backbone, prompts, flops, self.decider.axes)
        return RelaxedBatch(prompts, self.bank.gather(numbers, answers), answers, shares.maximum(least_B))

    def step(self) -> dict[str, float]:
        """One gradient step.

        Raises:
            InputError: a loss that is not finite.
        """
        for group in self.optimizer.param_groups:
            group["lr"] = self.config.learning_rate * (1 - self.progress)
        parts = relaxed_losses(self.settings, self.decider, self.draw(), self.progress)
        weighted = [part for name, part in parts.items() if name in ("answer", "cost", "distillation")]
        loss = torch.stack(weighted).sum()
        if not torch.isfinite(loss):
            raise InputError(
                f"the loss is {loss.item()} after {self.queries} queries; lower --learning-rate "
                f"(now {self.config.learning_rate:g}) or raise the last of --temperatures"
            )
        self.optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.controller.parameters(), 1.0)
        self.optimizer.step()
        self.queries += self.config.batch_size
        return {"reward": -loss.item(), **{name: part.item() for name, part in parts.items()}}

    def train(self) -> None:
        """Until ``total_queries`` are answered."""
        recent: list[dict[str, float]] = []
        config = self.config
        with tqdm(total=config.total_queries, initial=self.queries, desc="train", unit="query") as bar:
            while self.queries < config.total_queries:
                if not recent:
                    self._between_lines()
                recent.append(self.step())
                bar.update(config.batch_size)
                if len(recent) == LOG_EVERY or self.queries >= config.total_queries:
                    means = {name: float(np.mean([line[name] for line in recent])) for name in recent[0]}
                    bar.set_postfix(answer=f"{means['answer']:.3f}", flops=f"{means['soft_flops']:.2f}")
                    self.journal.write(self.queries, means)
                    recent = []
        self.journal.validate(self.queries, self.controller)
        self.save()

    def _between_lines(self) -> None:
        if self.journal.due_validation(self.queries):
            self.journal.validate(self.queries, self.controller)
        if self.journal.due_checkpoint(self.queries):
            self.save()

    def save(self) -> None:
        """Write a checkpoint of everything that the run's future depends on."""
        random_tensors, random_rest = random_state()
        weights = {f"controller.{name}": value for name, value in self.controller.state_dict().items()}
        tensors = {**weights, **optimizer_tensors(self.optimizer), **random_tensors}
        state = {"queries": self.queries, "random": random_rest, **self.journal.state()}
        save_checkpoint(self.journal.folder.checkpoints, self.queries, tensors, state)

    def restore(self) -> None:
        """Continue from the run's last checkpoint, if it has one."""
        loaded = load_checkpoint(self.journal.folder.checkpoints)
        if loaded is None:
            return
        tensors, state = loaded
        prefix = "controller."
        weights: dict[str, Any] = {
            name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)
        }
        self.controller.load_state_dict(weights)
        restore_optimizer(self.optimizer, tensors)
        self.queries = state["queries"]
        self.journal.load_state(state)
        restore_random_state(tensors, state["random"])


LOG_EVERY = 8
"""Gradient steps in a line of metrics; validations and checkpoints fall between lines."""


def main() -> None:
    began = time.time()
    config = cli.parse(GumbelConfig)
    config.check()
    folder = RunFolder.create(config.out, config, config.resume)
    tracker = Tracker(config.wandb, folder.path, dataclasses.asdict(config))
    backbone = config.load(config.backbone)
    trainer = Trainer(config, backbone, RunJournal(config, folder, backbone, tracker, config.estimator))
    if config.resume:
        trainer.restore()
    trainer.train()
    conclude(config, folder, tracker, trainer.controller, backbone, config.estimator, began)


if __name__ == "__main__":
    cli.run(main)
