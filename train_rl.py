"""Train the two-level controller by PPO, evaluate it on the test split, and write a run folder."""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path
from typing import Any

import numpy as np
from stable_baselines3 import PPO
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.logger import Logger
from tqdm import tqdm

from backbones import Backbone, EncodingBank
from envs import MaskingCore, MaskingVecEnv, load_queries
from envs.sb3_env import info_columns
from eval import cli, report
from eval.evaluate import Record, check_budgets, evaluate
from eval.runs import RunFolder
from eval.tracking import Tracker
from policies.baselines import FullPlanner, RandomPlanner
from policies.checkpoints import (
    load_checkpoint,
    optimizer_tensors,
    random_state,
    restore_optimizer,
    restore_random_state,
    save_checkpoint,
)
from policies.controller import ControllerConfig, TwoLevelController
from policies.group_buffer import GroupRolloutBuffer
from policies.learned import ControllerPlanner, save_controller
from policies.sb3_policy import FittedVecEnv, TwoLevelPolicy


@dataclasses.dataclass
class RLConfig(cli.Placement):
    """Train a controller that decides, for each query and budget, which visual tokens, attention heads and layers a
    vision-language model computes. Ends with a table on the test split and a run folder."""

    backbone: str = "tiny"
    """Which VLM answers: `tiny` (embedded, nothing to download), a folder, or a hub id."""
    data: str = "easy-vqa"
    """Queries: a name, or a path with the columns image, question, answers."""
    reward: tuple[str, ...] = ("accuracy-flops", "0.3*log-likelihood")
    """A reward's name, or your own function as `package.module:function`; several are summed, each with an optional
    weight: `accuracy -0.3*flops 0.1*my_rewards:shape`. The default adds a dense term, the log-likelihood of the right
    answer, to accuracy minus FLOPs: it tells two right answers, or two wrong ones, apart."""
    budgets: tuple[float, float] = (0.2, 1.0)
    """Each training query's budget is uniform between these shares of the full plan's LLM FLOPs."""
    total_queries: int = 60_000
    """Plans to answer in training (rounded up to whole rollouts)."""
    seed: int = 0
    """Of the controller's weights, the queries, the budgets and the plans."""
    out: Path = Path("runs/rl")
    """Run folder to make."""
    resume: bool = False
    """Continue the run in `out` from its last checkpoint, as if it had never stopped."""
    envs: int = 256
    """Plans answered in one batched call of the backbone."""
    rollout_steps: int = 4
    """Batched calls between two updates."""
    plans_per_query: int = 4
    """Plans tried for the same query and budget; with several, each is judged against the others (leave-one-out), with
    one, against the critic."""
    epochs: int = 4
    """Passes over a rollout in each update."""
    batch_size: int = 256
    """Transitions in a gradient step."""
    learning_rate: float = 1e-3
    """Of Adam, falling linearly to zero."""
    clip_range: float = 0.2
    """PPO's clip of the joint probability ratio."""
    entropy: float = 0.0
    """Weight of the mean entropy per decision."""
    width: int = 48
    """Width of the controller."""
    validate_every: int = 10_000
    """Answered plans between validations."""
    validate_queries: int = 500
    """Queries in a validation."""
    checkpoint_every: int = 10_000
    """Answered plans between checkpoints."""
    test_budgets: tuple[float, ...] = (0.25, 0.5, 0.75, 1.0)
    """Budgets of the final table."""
    test_queries: int | None = None
    """Queries of the test split to use; all by default."""
    wandb: str | None = None
    """Also track the run in this Weights & Biases project; without a key, offline."""

    def check(self) -> None:
        """Refuse options that cannot work, before anything is loaded or written."""
        check_budgets(self.test_budgets)
        for name in (
            "total_queries",
            "envs",
            "rollout_steps",
            "epochs",
            "batch_size",
            "width",
            "plans_per_query",
            "validate_every",
            "validate_queries",
            "checkpoint_every",
        ):
            if getattr(self, name) < 1:
                raise cli.InputError(f"--{name.replace('_', '-')} is {getattr(self, name)}; it must be at least 1")
        if not self.learning_rate > 0 or not self.clip_range > 0 or self.entropy < 0:
            raise cli.InputError(
                f"--learning-rate {self.learning_rate:g} and --clip-range {self.clip_range:g} must be above 0, "
                f"--entropy {self.entropy:g} at least 0"
            )


def build(config: RLConfig) -> tuple[PPO, MaskingVecEnv]:
    """The environment, and PPO on it with the two-level policy."""
    backbone = config.load(config.backbone)
    sizes = ControllerConfig.for_layout(backbone.layout, backbone.hidden, width=config.width)
    core = MaskingCore(
        backbone,
        load_queries(config.data, "train"),
        reward=config.reward,
        budgets=config.budgets,
        controller_flops=TwoLevelController(sizes).flops,
    )
    venv = MaskingVecEnv(core, config.envs, config.plans_per_query)
    fitted = FittedVecEnv(venv)
    model = PPO(
        TwoLevelPolicy,
        fitted,
        learning_rate=lambda remaining: config.learning_rate * remaining,
        n_steps=config.rollout_steps,
        batch_size=config.batch_size,
        n_epochs=config.epochs,
        clip_range=config.clip_range,
        ent_coef=config.entropy,
        rollout_buffer_class=GroupRolloutBuffer,
        rollout_buffer_kwargs={"plans_per_query": config.plans_per_query},
        policy_kwargs={"bank": core.bank, "controller": {"width": config.width}},
        seed=config.seed,
        device=backbone.device,
    )
    model.set_logger(Logger(folder=None, output_formats=[]))
    assert isinstance(model.policy, TwoLevelPolicy)
    fitted.policy = model.policy
    return model, venv


class RunCallback(BaseCallback):
    """Progress bar, metrics, validation and checkpoints of a run.

    Args:
        config: the run's options.
        folder: where to write.
        venv: the environment, whose state goes into checkpoints.
        validation: queries of the validation split.
        tracker: further place for metrics.
    """

    INFO = ("accuracy", "flops", "budget", "kept_tokens", "kept_heads", "kept_layers")

    def __init__(
        self, config: RLConfig, folder: RunFolder, venv: MaskingVecEnv, validation: EncodingBank, tracker: Tracker
    ):
        super().__init__()
        self.config, self.folder, self.venv = config, folder, venv
        self.validation, self.tracker = validation, tracker
        self.lines = 0
        self.began = time.time()
        self.next_validation, self.next_checkpoint = config.validate_every, 0
        self._rollout: list[dict[str, np.ndarray]] = []

    def _on_training_start(self) -> None:
        self.bar = tqdm(total=self.config.total_queries, initial=self.num_timesteps, desc="train", unit="plan")

    def _on_step(self) -> bool:
        columns = info_columns(self.locals["infos"], self.INFO)
        self._rollout.append({"reward": self.locals["rewards"].copy(), **columns})
        self.bar.update(self.venv.num_envs)
        return True

    def _on_rollout_start(self) -> None:
        """The last update is done here, so metrics and checkpoints are complete."""
        self._log_rollout()
        if self.num_timesteps >= self.next_validation:
            self.next_validation += self.config.validate_every
            self._validate()
        if self.num_timesteps >= self.next_checkpoint:
            self.next_checkpoint = self.num_timesteps + self.config.checkpoint_every
            self.save()

    def _on_training_end(self) -> None:
        self._log_rollout()
        self._validate()

    def _log_rollout(self) -> None:
        if not self._rollout:
            return
        means = {name: float(np.mean([step[name] for step in self._rollout])) for name in self._rollout[0]}
        self._rollout = []
        update = {
            name.removeprefix("train/"): float(value)
            for name, value in self.logger.name_to_value.items()
            if name in ("train/approx_kl", "train/clip_fraction", "train/entropy_loss", "train/explained_variance")
        }
        self.bar.set_postfix(reward=f"{means['reward']:.3f}", accuracy=f"{means['accuracy']:.3f}")
        self._write({**means, **update})

    def _validate(self) -> None:
        planner = ControllerPlanner(self._controller(), self._backbone(), "rl")
        records = evaluate(planner, self._backbone(), self.validation, self.config.test_budgets, progress=False)
        kept = ("accuracy", "llm_flops_ratio", "budget_violations")
        self._write({"validation": {str(r["budget"]): {name: r[name] for name in kept} for r in records}})

    def _write(self, metrics: dict[str, Any]) -> None:
        self.folder.log(queries=self.num_timesteps, **metrics)
        self.lines += 1
        self.tracker.log(self.num_timesteps, metrics)

    def _controller(self) -> TwoLevelController:
        assert isinstance(self.model.policy, TwoLevelPolicy)
        return self.model.policy.controller

    def _backbone(self) -> Backbone:
        return self.venv.core.backbone

    def save(self) -> None:
        """Write a checkpoint of everything that the run's future depends on."""
        random_tensors, random_rest = random_state()
        policy = {f"policy.{name}": value for name, value in self.model.policy.state_dict().items()}
        state = {
            "queries": self.num_timesteps,
            "updates": self.model._n_updates,
            "random": random_rest,
            "environment": self.venv.state(),
            "lines": self.lines,
            "next_validation": self.next_validation,
            "next_checkpoint": self.next_checkpoint,
        }
        tensors = {**policy, **optimizer_tensors(self.model.policy.optimizer), **random_tensors}
        save_checkpoint(self.folder.checkpoints, self.num_timesteps, tensors, state)

    def restore(self, model: PPO) -> None:
        """Continue from the run's last checkpoint, if it has one."""
        loaded = load_checkpoint(self.folder.checkpoints)
        if loaded is None:
            return
        tensors, state = loaded
        policy = {name.removeprefix("policy."): value for name, value in tensors.items() if name.startswith("policy.")}
        model.policy.load_state_dict(policy)
        restore_optimizer(model.policy.optimizer, tensors)
        model.num_timesteps = state["queries"]
        model._n_updates = state["updates"]
        model._last_obs = self.venv.load_state(state["environment"])
        model._last_episode_starts = np.ones(self.venv.num_envs, bool)
        self.lines = state["lines"]
        self.next_validation, self.next_checkpoint = state["next_validation"], state["next_checkpoint"]
        self.folder.truncate_metrics(self.lines)
        restore_random_state(tensors, state["random"])


def train(config: RLConfig, folder: RunFolder, tracker: Tracker) -> tuple[TwoLevelController, Backbone]:
    """Train, or finish training, in ``folder``."""
    model, venv = build(config)
    validation = load_queries(config.data, "validation", config.validate_queries)
    callback = RunCallback(config, folder, venv, EncodingBank(venv.core.backbone, validation), tracker)
    if config.resume:
        callback.restore(model)
    remaining = config.total_queries - model.num_timesteps
    if remaining > 0:
        try:
            model.learn(remaining, callback, reset_num_timesteps=model._last_obs is None)
        finally:
            callback.bar.close()
        callback.save()
    assert isinstance(model.policy, TwoLevelPolicy)
    save_controller(model.policy.controller, folder.path)
    return model.policy.controller, venv.core.backbone


def test(config: RLConfig, controller: TwoLevelController, backbone: Backbone) -> list[Record]:
    """Records of the controller, random plans of equal cost and the plain model on the test split."""
    bank = EncodingBank(backbone, load_queries(config.data, "test", config.test_queries))
    planners = [
        FullPlanner(backbone),
        RandomPlanner(backbone, config.seed),
        ControllerPlanner(controller, backbone, "rl"),
    ]
    return [
        record for planner in planners for record in evaluate(planner, backbone, bank, config.test_budgets, config.seed)
    ]


def main() -> None:
    config = cli.parse(RLConfig)
    config.check()
    folder = RunFolder.create(config.out, config, config.resume)
    tracker = Tracker(config.wandb, folder.path, dataclasses.asdict(config))
    controller, backbone = train(config, folder, tracker)
    records = test(config, controller, backbone)
    folder.write_result(records)
    report.plot_tradeoff(records, folder.path / "tradeoff.png")
    report.plot_training(folder.metrics(), folder.path / "training.png")
    tracker.finish({"tradeoff": folder.path / "tradeoff.png", "training": folder.path / "training.png"})
    print(report.table(records))
    print(f"\nrun folder: {folder.path}  (plots: tradeoff.png, training.png)")


if __name__ == "__main__":
    cli.run(main)
