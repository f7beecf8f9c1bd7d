"""The environment's core with its plans executed by Ray workers, each with a replica of the backbone.

Queries and budgets are drawn, and rewards computed, in the learner's process; workers answer plans and remember
nothing. So a worker that is lost is started again by Ray, and what it was asked is asked again.

Shape legend: B slots of the environment, A flat action length.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import fields
from typing import Any

import numpy as np
import torch

from maskgym.backbones.backbone import Backbone
from maskgym.common.errors import InputError
from maskgym.envs.core import MaskingCore
from maskgym.envs.rewards import RewardTerms


class Replica:
    """What runs in a worker.

    Args:
        make: loads backbone and data.
        threads: of PyTorch.
    """

    def __init__(self, make: Callable[[], MaskingCore], threads: int):
        torch.set_num_threads(threads)
        self.core = make()

    def execute(
        self, numbers: np.ndarray, budgets: np.ndarray, actions: np.ndarray
    ) -> tuple[RewardTerms, dict[str, np.ndarray]]:
        return self.core.execute(numbers, budgets, actions)

    def process(self) -> int:
        return os.getpid()


class RayCore(MaskingCore):
    """A core whose plans are executed by workers, equal shares of the slots each.

    Args:
        workers: how many; on CUDA one for each device, on the CPU at most one for each core.
        backbone: of this process, for the policy.
        load: loads the same in each worker.
        **options: of ``MaskingCore``, with ``data`` as a name or path.

    Raises:
        InputError: Ray is not installed, or there are fewer devices than workers.
    """

    def __init__(self, workers: int, backbone: Backbone, load: Callable[[], Backbone], **options: Any):
        ray = import_ray()
        super().__init__(backbone, **options)
        check_workers(workers, self.backbone.device)
        own = {name: value for name, value in options.items() if name != "reward"}
        cuda = self.backbone.device.type == "cuda"
        threads = max(1, (os.cpu_count() or 1) // workers)
        if not ray.is_initialized():
            ray.init(include_dashboard=False, log_to_driver=False, configure_logging=False)
        # no CPUs are asked for: a second core in one process would wait for them for ever
        remote = ray.remote(num_cpus=0, num_gpus=int(cuda), max_restarts=-1, max_task_retries=-1)(Replica)
        self.workers = [remote.remote(lambda: MaskingCore(backbone=load(), **own), threads) for _ in range(workers)]

    def execute(
        self, numbers: np.ndarray, budgets: np.ndarray, actions: np.ndarray
    ) -> tuple[RewardTerms, dict[str, np.ndarray]]:
        ray = import_ray()
        shards = (np.array_split(part, len(self.workers)) for part in (numbers, budgets, actions))
        asked = [
            worker.execute.remote(*shard)
            for worker, shard in zip(self.workers, zip(*shards, strict=True), strict=True)
            if len(shard[0])
        ]
        try:
            answered = ray.get(asked)
        except ray.exceptions.RayTaskError as error:
            if isinstance(error.cause, InputError):
                raise error.cause from error
            raise
        terms, parts = zip(*answered, strict=True)
        return _joined(terms), {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}

    def processes(self) -> list[int]:
        """The workers' process numbers."""
        return import_ray().get([worker.process.remote() for worker in self.workers])


def import_ray() -> Any:
    """Ray.

    Raises:
        InputError: it is not installed.
    """
    try:
        import ray
    except ImportError as error:
        raise InputError("--workers needs Ray; install it with: pip install 'maskgym[ray]'") from error
    return ray


def check_workers(workers: int, device: torch.device) -> None:
    """Refuse more workers than there are devices for.

    Raises:
        InputError: saying how many there are.
    """
    cuda = device.type == "cuda"
    most = torch.cuda.device_count() if cuda else os.cpu_count() or 1
    if not 1 <= workers <= most:
        what = "GPUs" if cuda else "CPU cores"
        raise InputError(
            f"--workers is {workers}, but there are {most} {what}, one for each worker; give at most {most}"
        )


def _joined(parts: tuple[RewardTerms, ...]) -> RewardTerms:
    columns: dict[str, Any] = {}
    for field in fields(RewardTerms):
        own = [getattr(part, field.name) for part in parts]
        columns[field.name] = None if own[0] is None else np.concatenate(own)
    return RewardTerms(**columns)
