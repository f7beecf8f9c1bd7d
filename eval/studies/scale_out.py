"""``python -m maskgym.eval scale-out``: how PPO's rollouts go on many workers, simulated from what was measured here.

Workers execute plans, one process learns (``maskgym.envs.ray_core``): a step lasts as long as its slowest worker, and
what the learner does grows with the number of plans.

Shape legend: S simulated steps, W workers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from stable_baselines3.common.type_aliases import PyTorchObs
from stable_baselines3.common.utils import obs_as_tensor

from maskgym.backbones import Backbone
from maskgym.common.errors import InputError
from maskgym.envs import MaskingCore, load_queries
from maskgym.envs.core import Slots
from maskgym.eval import cli
from maskgym.eval.answering import Answering
from maskgym.eval.measure.latency import timed
from maskgym.eval.measure.report import markdown
from maskgym.policies.baselines import random_plans
from maskgym.policies.controller.network import ControllerConfig
from maskgym.policies.ppo.sb3_policy import TwoLevelPolicy


@dataclass
class ScaleOut(cli.Placement, Answering):
    """Simulate training with train_rl.py --workers on more workers than there are here.

    Measures, on this machine, how long one worker takes for its plans, time and again, and how long the learner takes
    for as many: deciding, and the gradient steps. Then draws a latency for each of W workers from those measured, step
    by step; a step ends when the slowest worker does. Each worker has the same number of plans whatever W is.

    Example: python -m maskgym.eval scale-out --data scenes --workers 1 8 64
    """

    backbone: str = "tiny"
    """Which VLM."""
    data: str = "easy-vqa"
    """Queries: a name, or a path with the columns image, question, answers."""
    workers: tuple[int, ...] = (1, 2, 4, 8, 16, 32, 64)
    """Numbers of workers to simulate."""
    rows: int = 128
    """Plans that a worker answers in a step."""
    epochs: int = 4
    """Passes over a rollout in each update of PPO."""
    transfer_ms: float = 2.0
    """What a call to a worker takes besides: some milliseconds with Ray, within a machine or a fast network."""
    slower: float = 1.0
    """Multiply workers' times by this: a larger VLM, with the same controller."""
    steps: int = 2000
    """Steps to simulate."""
    repeats: int = 20
    """Batches to measure."""
    seed: int = 0
    """Of plans and simulation."""
    json: Path | None = None
    """Also write the figures there."""

    def run(self) -> None:
        for name in ("rows", "epochs", "steps", "repeats"):
            if getattr(self, name) < 1:
                raise InputError(f"--{name} is {getattr(self, name)}; it must be at least 1")
        if not self.workers or min(self.workers) < 1:
            raise InputError(f"--workers is {' '.join(map(str, self.workers))}; give numbers of at least 1")
        if not self.slower > 0 or self.transfer_ms < 0:
            raise InputError(
                f"--slower {self.slower:g} must be above 0, and --transfer-ms {self.transfer_ms:g} at least 0"
            )
        self.check_cut()
        cli.check_output("--json", self.json)
        worker_seconds, learner_seconds = measure(
            self.load(self.backbone),
            self.data,
            self.rows,
            self.epochs,
            self.repeats,
            self.seed,
            self.max_new_tokens,
        )
        middle, late = np.quantile(worker_seconds, [0.5, 0.95])
        found = [
            simulate(
                worker_seconds * self.slower,
                learner_seconds,
                self.transfer_ms / 1e3,
                workers,
                self.rows,
                self.steps,
                self.seed,
            )
            for workers in sorted(set(self.workers))
        ]
        cli.write_json(self.json, [asdict(each) for each in found])
        print(
            f"{self.rows} plans: a worker takes {1e3 * middle:.0f} ms (median; 95 %: {1e3 * late:.0f} ms), the learner "
            f"{1e3 * learner_seconds:.0f} ms"
        )
        print(scaling_table(found))


@dataclass(frozen=True)
class Scaling:
    """What a number of workers would do.

    Attributes:
        workers: how many.
        plans_per_second: answered and learned from.
        speed_up: over one worker.
        learner_share: of the time, in which workers wait for the learner.
        straggler_share: of the time, in which the mean worker waits for the slowest.
    """

    workers: int
    plans_per_second: float
    speed_up: float
    learner_share: float
    straggler_share: float


def measure(
    backbone: Backbone,
    data: str,
    rows: int,
    epochs: int,
    repeats: int,
    seed: int = 0,
    max_new_tokens: int | None = None,
) -> tuple[np.ndarray, float]:
    """Seconds of a worker for ``rows`` plans, (repeats,), and the learner's for as many (median)."""
    torch.manual_seed(seed)
    core = MaskingCore(backbone, load_queries(data, "validation", 4 * rows), max_new_tokens=max_new_tokens)
    slots = Slots(core, rows)
    slots.seed(seed)
    policy = _policy(core)
    generator = torch.Generator().manual_seed(seed)
    workers, learners = [], []
    for repeat in range(repeats + 1):
        slots.draw()
        observation = obs_as_tensor(slots.observe(), backbone.device)
        encoding = core.bank.gather(slots.numbers)  # images are encoded once in a training, not in each step
        shares = torch.from_numpy(slots.budgets).double()
        plans = core.layout.flatten(random_plans(backbone, encoding, shares, generator)).cpu().numpy().astype(np.int8)

        def execute(plans: np.ndarray = plans) -> None:
            core.execute(slots.numbers, slots.budgets, plans)

        def learn(observation: PyTorchObs = observation) -> None:
            with torch.no_grad():
                actions, _, _ = policy(observation)
            for _ in range(epochs):
                _, log_probs, _ = policy.evaluate_actions(observation, actions)
                policy.optimizer.zero_grad()
                log_probs.mean().backward()
                policy.optimizer.step()

        times = [timed(work, backbone.device) for work in (execute, learn)]
        if repeat:  # the first warms up
            workers.append(times[0])
            learners.append(times[1])
    return np.array(workers), float(np.median(learners))


def _policy(core: MaskingCore) -> TwoLevelPolicy:
    sizes = ControllerConfig.for_layout(core.layout, core.backbone.hidden, rule="fill")
    policy = TwoLevelPolicy(core.observation_space, core.action_space, lambda _: 1e-9, core.bank, sizes)
    return policy.to(core.backbone.device)


def simulate(
    worker_seconds: np.ndarray,
    learner_seconds: float,
    transfer_seconds: float,
    workers: int,
    rows: int,
    steps: int,
    seed: int = 0,
) -> Scaling:
    """Steps of ``workers`` x ``rows`` plans.

    Args:
        worker_seconds: measured for ``rows`` plans; each worker's time in each step is drawn from these.
        learner_seconds: for ``rows`` plans.
        transfer_seconds: of a call.
        workers: W.
        rows: plans of a worker in a step.
        steps: S.
        seed: of the draws.
    """
    drawn_SW = np.random.default_rng(seed).choice(worker_seconds, (steps, workers))
    slowest_S = drawn_SW.max(1)
    learner = workers * learner_seconds
    step = float(slowest_S.mean()) + transfer_seconds + learner
    alone = float(worker_seconds.mean()) + transfer_seconds + learner_seconds
    rate = workers * rows / step
    waited = float((slowest_S - drawn_SW.mean(1)).mean())
    return Scaling(workers, rate, rate * alone / rows, learner / step, waited / step)


def scaling_table(found: Sequence[Scaling]) -> str:
    """Markdown, a row for each number of workers."""
    head = ["workers", "plans/s", "speed-up", "learner's share %", "waiting for the slowest %"]
    rows = [
        [
            str(each.workers),
            f"{each.plans_per_second:,.0f}",
            f"{each.speed_up:.1f}",
            f"{100 * each.learner_share:.0f}",
            f"{100 * each.straggler_share:.0f}",
        ]
        for each in found
    ]
    return markdown([head, *rows])
