"""Speed and memory of the trainings' gradient steps on a backbone, with queries about noise."""

from __future__ import annotations

import gc
import time
from collections.abc import Hashable, Sequence
from contextlib import suppress
from typing import Any

import numpy as np
import torch
from PIL import Image
from stable_baselines3 import PPO
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.logger import Logger

from maskgym.backbones.backbone import Backbone
from maskgym.backbones.encodings.encoding import EncodingBank, Query
from maskgym.envs import MaskingCore, MaskingVecEnv
from maskgym.eval.bench.shapes import QUESTION
from maskgym.eval.measure.latency import peak_bytes, synchronise, timed
from maskgym.policies.controller.decisions import Decider
from maskgym.policies.controller.network import ControllerConfig, TwoLevelController
from maskgym.policies.ppo.group_buffer import GroupRolloutBuffer
from maskgym.policies.ppo.sb3_policy import FittedVecEnv, TwoLevelPolicy
from maskgym.policies.relaxation.training import RelaxationSettings, RelaxedBatch, RelaxedLearner

BUDGETS = (0.2, 1.0)


class NoiseQueries:
    """Queries about images of noise, as many as images.

    Args:
        count: how many.
    """

    def __init__(self, count: int):
        self.count = count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, number: int) -> Query:
        pixels = np.random.default_rng(number).integers(0, 256, (336, 336, 3), dtype=np.uint8)
        id, question, answers = self.text(number)
        return Query(id, Image.fromarray(pixels), question, answers, number)

    def image_key(self, number: int) -> Hashable:
        return number

    def text(self, number: int) -> tuple[str, str, tuple[str, ...]]:
        return f"noise {number}", QUESTION, ("color",)


def ppo_speed(backbone: Backbone, seconds: float, rows: int = 32, plans_per_query: int = 4) -> dict[str, Any]:
    """Rollouts of ``rows`` plans, and updates of two passes over each, until the time is over.

    Returns:
        ``plans_per_second`` in all, ``rollout_seconds`` and ``update_seconds`` (medians), and ``peak_memory_mb``.
    """
    sizes = ControllerConfig.for_layout(backbone.layout, backbone.hidden, rule="fill")
    reward, charged = ("soft-accuracy", "-0.02*flops"), TwoLevelController(sizes).flops
    core = MaskingCore(backbone, NoiseQueries(8), reward=reward, budgets=BUDGETS, controller_flops=charged)
    venv = FittedVecEnv(MaskingVecEnv(core, rows, plans_per_query))
    learner = PPO(
        TwoLevelPolicy,
        venv,
        n_steps=1,
        n_epochs=2,
        batch_size=rows,
        rollout_buffer_class=GroupRolloutBuffer,
        rollout_buffer_kwargs={"plans_per_query": plans_per_query},
        policy_kwargs={"bank": core.bank, "controller": sizes},
        seed=0,
        device=backbone.device,
    )
    learner.set_logger(Logger(folder=None, output_formats=[]))
    assert isinstance(learner.policy, TwoLevelPolicy)
    venv.policy = learner.policy
    _reset_peak(backbone.device)
    clock = _RolloutClock(backbone.device, seconds)
    learner.learn(10**9, clock)
    return _speed({"rollout": clock.rollouts, "update": clock.updates}, rows, backbone.device)


class _RolloutClock(BaseCallback):
    """Seconds of rollouts and updates; ends the training when the time is over and an update after the first, which
    warms up, is done.

    Args:
        device: waited for before a clock is read.
        seconds: the time.
    """

    def __init__(self, device: torch.device, seconds: float):
        super().__init__()
        self.device, self.end = device, time.perf_counter() + seconds
        self.rollouts: list[float] = []
        self.updates: list[float] = []
        self._since = 0.0

    def _lap(self) -> float:
        synchronise(self.device)
        now = time.perf_counter()
        taken, self._since = now - self._since, now
        return taken

    def _on_training_start(self) -> None:
        self._lap()

    def _on_rollout_start(self) -> None:
        if self.rollouts:
            self.updates.append(self._lap())

    def _on_step(self) -> bool:
        return len(self.updates) < 2 or time.perf_counter() < self.end

    def _on_rollout_end(self) -> None:
        self.rollouts.append(self._lap())


def gumbel_speed(backbone: Backbone, seconds: float, batches: Sequence[int] = (8, 4, 2, 1)) -> dict[str, Any]:
    """Gradient steps of Gumbel straight-through on the first of these batch sizes that there is memory for, until the
    time is over.

    Returns:
        ``rows`` of the batch, ``plans_per_second``, ``step_seconds`` (median) and ``peak_memory_mb``.

    Raises:
        OutOfMemoryError: not even for the last one.
    """
    for rows in batches[:-1]:
        with suppress(torch.OutOfMemoryError):
            return _gumbel_speed(backbone, seconds, rows)
        gc.collect()
        torch.cuda.empty_cache()
    return _gumbel_speed(backbone, seconds, batches[-1])


def _gumbel_speed(backbone: Backbone, seconds: float, rows: int) -> dict[str, Any]:
    torch.manual_seed(0)
    controller = TwoLevelController(ControllerConfig.for_layout(backbone.layout, backbone.hidden, rule="fill"))
    learner = RelaxedLearner(Decider(controller.to(backbone.device), backbone), RelaxationSettings())
    optimizer = torch.optim.Adam(controller.parameters(), lr=1e-3)
    bank = EncodingBank(backbone, NoiseQueries(rows))
    prompts = bank.gather(range(rows))
    answers = [backbone.answer_ids(accepted[0]) for accepted in prompts.answers]
    least_B = learner.least_share(prompts)
    budgets_B = least_B + (1 - least_B) * torch.linspace(0.2, 0.8, rows, dtype=torch.float64, device=backbone.device)
    batch = RelaxedBatch(prompts, bank.gather(range(rows), answers), answers, budgets_B)

    def step() -> None:
        parts = learner.losses(batch, progress=0.5)
        optimizer.zero_grad()
        (parts["answer"] + parts["cost"]).backward()
        optimizer.step()

    _reset_peak(backbone.device)
    taken: list[float] = []
    end = time.perf_counter() + seconds
    while len(taken) < 2 or time.perf_counter() < end:
        taken.append(timed(step, backbone.device))
    return _speed({"step": taken}, rows, backbone.device)


def _reset_peak(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def _speed(taken: dict[str, list[float]], plans: int, device: torch.device) -> dict[str, Any]:
    """Figures from the seconds of each part; the first of each, which warmed up, does not count."""
    medians = {name: float(np.median(times[1:])) for name, times in taken.items()}
    return {
        "rows": plans,
        "plans_per_second": plans / sum(medians.values()),
        **{f"{name}_seconds": median for name, median in medians.items()},
        "peak_memory_mb": peak_bytes(device) / 1e6,
    }
