"""Train the two-level controller by PPO (or A2C), evaluate it on the test split, and write a run folder."""

from __future__ import annotations

import dataclasses
import os
import time
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch: threads that spin while cores are busy cost tenfold

import numpy as np
import torch
from stable_baselines3 import A2C, PPO
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.logger import Logger
from stable_baselines3.common.on_policy_algorithm import OnPolicyAlgorithm
from tqdm import tqdm

from maskgym.backbones import Backbone
from maskgym.common.determinism import deterministic
from maskgym.common.errors import InputError
from maskgym.common.run_folder import RunFolder
from maskgym.common.stopping import StopSignals
from maskgym.common.time_limit import check_seconds
from maskgym.common.tracking import Tracker
from maskgym.envs import MaskingCore, MaskingVecEnv
from maskgym.envs.ray_core import RayCore
from maskgym.envs.sb3_env import info_columns
from maskgym.eval import cli
from maskgym.eval.measure.timing import how_to_calibrate, load_latency_model
from maskgym.policies.controller.learned import EXPECTED
from maskgym.policies.controller.network import TwoLevelController
from maskgym.policies.ppo.group_buffer import GroupRolloutBuffer
from maskgym.policies.ppo.sb3_policy import FittedVecEnv, TwoLevelPolicy, ratio_sizes
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
from maskgym.training.settling import Settled

if TYPE_CHECKING:
    from maskgym.training.joint_tuning import JointTuning


@dataclasses.dataclass
class RLConfig(ControllerRunConfig):
    """Train a controller that decides, for each query and budget, which visual tokens, attention heads and layers a
    vision-language model computes. Ends with a table on the test split and a run folder."""

    total_queries: int = 15_000
    """Queries to draw in training (rounded up to whole rollouts), each with a budget; answered under
    `plans-per-query` plans."""
    validate_every: int = 1000
    """Queries between validations."""
    validate_queries: int = 250
    """Queries in a validation, each at every one of `test-budgets`."""
    checkpoint_every: int = 2500
    """Queries between checkpoints."""
    learning_rate: float = 1e-3
    """Of Adam, falling linearly to zero."""
    token_spread: float | None = 2.0
    """How firmly an untrained controller keeps to the visual tokens of its first plan, as --initial-spread for heads
    and layers. Small: many are tried, so more is learned of which matter to a query."""
    reward: tuple[str, ...] = ("soft-accuracy", "-0.02*flops")
    """A reward's name, or your own function as `package.module:function`; several are summed, each with an optional
    weight: `accuracy -0.3*flops 0.1*my_rewards:shape`. The default is accuracy minus FLOPs with the step of accuracy
    made smooth: it tells two right answers, or two wrong ones, apart."""
    reward_seconds: float = 300.0
    """Seconds that each reward may take for a batch of plans; one that takes longer ends the training, which keeps its
    last checkpoint. 0: any time."""
    out: Path = Path("runs/rl")
    """Run folder to make."""
    envs: int = 256
    """Plans answered in one batched call of the backbone."""
    rollout_steps: int = 4
    """Batched calls between two updates."""
    plans_per_query: int = 4
    """Plans tried for the same query and budget; with several, each is judged against the others (leave-one-out), with
    one, against the critic."""
    ratios: Literal["joint", "level", "axis", "bit"] = "joint"
    """Which decisions share one probability ratio: the whole plan, each level, each axis, or none."""
    algo: Literal["ppo", "a2c"] = "ppo"
    """ppo: several passes over each rollout with clipped ratios; a2c: one gradient step a rollout."""
    fit: bool = True
    """Project sampled plans into their budgets before they are executed, as in use. Without it plans may overspend in
    training, and the reward must make them not: lagrangian, or -2*overspend."""
    latency_model: Path | None = None
    """Predicts prefill times for the reward `latency`: a file that python -m maskgym.eval latency --out wrote here."""
    workers: int = 0
    """Execute plans in so many Ray workers (extra `ray`), each with a replica of the backbone: one for each GPU, or CPU
    core. 0: in this process."""
    epochs: int = 4
    """ppo: passes over a rollout in each update."""
    batch_size: int = 256
    """ppo: transitions in a gradient step."""
    clip_range: float = 0.2
    """ppo: clip of the probability ratios."""
    entropy: float = 0.0
    """Weight of the mean entropy per decision."""

    @property
    def answers(self) -> int:
        return self.plans_per_query

    def check(self) -> None:
        super().check()
        self.check_at_least_one("envs", "rollout_steps", "epochs", "batch_size", "plans_per_query")
        check_seconds("--reward-seconds", self.reward_seconds)
        if self.workers < 0 or (self.workers and self.tune_backbone != "off"):
            why = "a tuned backbone cannot have replicas" if self.workers > 0 else "it must be at least 0"
            raise cli.InputError(f"--workers is {self.workers}; {why}")
        if self.latency_model is None and "latency" in [part.rpartition("*")[2] for part in self.reward]:
            raise cli.InputError(
                f"--reward latency needs --latency-model FILE; make one with: {how_to_calibrate(self.backbone)}"
            )
        if not self.clip_range > 0 or self.entropy < 0:
            raise cli.InputError(
                f"--clip-range {self.clip_range:g} must be above 0, --entropy {self.entropy:g} at least 0"
            )


def build(config: RLConfig) -> tuple[OnPolicyAlgorithm, MaskingVecEnv]:
    """The environment, and the learner on it with the two-level policy."""
    backbone = config.load_priced()
    sizes = config.sizes(backbone)
    options: dict[str, Any] = {
        "data": config.data,
        "reward": config.reward,
        "reward_seconds": config.reward_seconds,
        "budgets": config.budgets,
        "max_new_tokens": config.max_new_tokens,
        "max_failed": config.max_failed,
        **config.laying_out(),
        "controller_flops": TwoLevelController(sizes).flops,
        "latency_model": None if config.latency_model is None else load_latency_model(config.latency_model, backbone),
    }
    if config.workers:
        price = {EXPECTED: backbone.expected_answer_tokens}
        core: MaskingCore = RayCore(config.workers, backbone, partial(config.load, config.backbone, price), **options)
    else:
        core = MaskingCore(backbone, **options)
    venv = MaskingVecEnv(core, config.envs, config.plans_per_query)
    fitted = FittedVecEnv(venv) if config.fit else None
    common: dict[str, Any] = {
        "learning_rate": lambda remaining: config.learning_rate * remaining,
        "n_steps": config.rollout_steps,
        "ent_coef": config.entropy,
        "rollout_buffer_class": GroupRolloutBuffer,
        "rollout_buffer_kwargs": {
            "plans_per_query": config.plans_per_query,
            "ratios": len(ratio_sizes(config.ratios, backbone.layout)),
        },
        "policy_kwargs": {"bank": core.bank, "controller": sizes, "ratios": config.ratios},
        "seed": config.seed,
        "device": backbone.device,
    }
    model: OnPolicyAlgorithm
    if config.algo == "a2c":
        model = A2C(TwoLevelPolicy, fitted or venv, use_rms_prop=False, normalize_advantage=True, **common)
    else:
        own: dict[str, Any] = {
            "batch_size": config.batch_size,
            "n_epochs": config.epochs,
            "clip_range": config.clip_range,
        }
        model = PPO(TwoLevelPolicy, fitted or venv, **own, **common)
    model.set_logger(Logger(folder=None, output_formats=[]))
    assert isinstance(model.policy, TwoLevelPolicy)
    if fitted is not None:
        fitted.policy = model.policy
    weights = config.initial_weights(backbone, sizes)
    if weights is not None:
        model.policy.controller.load_state_dict(weights)
    return model, venv


class RunCallback(BaseCallback):
    """Progress bar, metrics, validation and checkpoints of a run.

    Args:
        config: the run's options.
        journal: where metrics go.
        venv: the environment, whose state goes into checkpoints.
        signals: to stop, between two updates.
    """

    INFO = ("accuracy", "flops", "budget", "kept_tokens", "kept_heads", "kept_layers")

    def __init__(self, config: RLConfig, journal: RunJournal, venv: MaskingVecEnv, signals: StopSignals):
        super().__init__()
        self.config, self.journal, self.venv, self.signals = config, journal, venv, signals
        self.tuning = config.tuning(venv.core.backbone)
        self._rollout: list[dict[str, np.ndarray]] = []
        self._executed: list[tuple[np.ndarray, ...]] = []

    @property
    def queries(self) -> int:
        """Drawn so far; SB3 counts plans."""
        return self.num_timesteps // self.config.plans_per_query

    def _on_training_start(self) -> None:
        self.bar = tqdm(total=self.config.total_queries, initial=self.queries, desc="train", unit="query")

    def _on_step(self) -> bool:
        columns = info_columns(self.locals["infos"], self.INFO)
        self._rollout.append({"reward": self.locals["rewards"].copy(), **columns})
        if self.tuning is not None:
            one_a_query = slice(None, None, self.config.plans_per_query)
            self._executed.append(tuple(part[one_a_query].copy() for part in self.venv.executed))
        self.bar.update(self.venv.num_envs // self.config.plans_per_query)
        return True

    def _on_rollout_end(self) -> None:
        if self.tuning is not None:
            self._tune(self.tuning)
        self.journal.clock.begin_update()

    def _tune(self, tuning: JointTuning) -> None:
        """A tuned backbone learns the answers under one of the plans that were tried for each query."""
        numbers, actions = (np.concatenate(parts) for parts in zip(*self._executed, strict=True))
        self._executed = []
        core = self.venv.core
        masks = core.laid_out(core.layout.unflatten(torch.from_numpy(actions).bool().to(core.backbone.device)))
        progress = min(1.0, self.queries / self.config.total_queries)
        self._tuning_loss = tuning.learn(core.bank, numbers, masks, progress)

    def _on_rollout_start(self) -> None:
        """The last update is done here, so metrics and checkpoints are complete."""
        self.journal.clock.end_update()
        self._log_rollout()
        if self.journal.due_validation(self.queries):
            self.journal.validate(self.queries, self._controller())
        if self.journal.due_checkpoint(self.queries):
            self.save()
        self.signals.obey(self.save)
        if self.journal.settling.settled:
            raise Settled

    def _on_training_end(self) -> None:
        self.journal.clock.end_update()
        self._log_rollout()
        self.journal.validate(self.queries, self._controller())

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
        if self.tuning is not None:
            update["tuning_loss"] = self._tuning_loss
        self.journal.write(self.queries, {**means, **update, **self.venv.core.left_out.metrics()})

    def _controller(self) -> TwoLevelController:
        assert isinstance(self.model.policy, TwoLevelPolicy)
        return self.model.policy.controller

    def save(self) -> None:
        """Write a checkpoint of everything that the run's future depends on."""
        random_tensors, random_rest = random_state()
        policy = {f"policy.{name}": value for name, value in self.model.policy.state_dict().items()}
        state = {
            "queries": self.queries,
            "updates": self.model._n_updates,
            "random": random_rest,
            "environment": self.venv.state(),
            **self.journal.state(),
        }
        tensors = {**policy, **optimizer_tensors(self.model.policy.optimizer), **random_tensors}
        tensors |= {} if self.tuning is None else self.tuning.tensors()
        save_checkpoint(self.journal.folder.checkpoints, self.queries, tensors, state)

    def restore(self, model: OnPolicyAlgorithm) -> None:
        """Continue from the run's last checkpoint, if it has one."""
        loaded = load_checkpoint(self.journal.folder.checkpoints)
        if loaded is None:
            self.journal.folder.truncate_metrics(0)
            return
        tensors, state = loaded
        with restoring(self.journal.folder.checkpoints):
            policy = {
                name.removeprefix("policy."): value for name, value in tensors.items() if name.startswith("policy.")
            }
            model.policy.load_state_dict(policy)
            restore_optimizer(model.policy.optimizer, tensors)
            if self.tuning is not None:
                self.tuning.restore(tensors)
            model.num_timesteps = state["queries"] * self.config.plans_per_query
            model._n_updates = state["updates"]
            assert isinstance(model.env, FittedVecEnv | MaskingVecEnv)
            model._last_obs = model.env.load_state(state["environment"])
            model._last_episode_starts = np.ones(self.venv.num_envs, bool)
            self.journal.load_state(state)
            restore_random_state(tensors, state["random"])


def train(
    config: RLConfig, folder: RunFolder, tracker: Tracker
) -> tuple[TwoLevelController, Backbone, JointTuning | None]:
    """Train, or finish training, in ``folder``."""
    model, venv = build(config)
    journal = RunJournal(config, folder, venv.core.backbone, tracker, "rl")
    with StopSignals(waits=True) as signals:
        callback = RunCallback(config, journal, venv, signals)
        if config.resume:
            callback.restore(model)
            folder.change_length()
        journal.say_cuts(venv.core.source)
        remaining = config.total_queries * config.plans_per_query - model.num_timesteps
        if remaining > 0:
            try:
                model.learn(remaining, callback, reset_num_timesteps=model._last_obs is None)
            except Settled:
                pass
            except InputError as error:
                raise InputError(f"{error}; after {callback.queries} queries, the last checkpoint is kept") from error
            finally:
                callback.bar.close()
            journal.end(callback.queries)
            callback.save()
    venv.core.left_out.say()
    assert isinstance(model.policy, TwoLevelPolicy)
    return model.policy.controller, venv.core.backbone, callback.tuning


def main() -> None:
    began = time.time()
    config = cli.parse(RLConfig)
    config.check()
    with RunFolder.begun(config.out, config, config.resume) as folder, deterministic(config.deterministic):
        if nothing_left(config, folder):
            return
        tracker = Tracker(config.wandb, folder.path, dataclasses.asdict(config), config.group)
        controller, backbone, tuning = train(config, folder, tracker)
        conclude(config, folder, tracker, controller, backbone, "rl", began, tuning)


def run_command() -> None:
    """What the shell starts: bad input, signals and full disks end it with one line and a status."""
    cli.run(main, cli.RESUME)
