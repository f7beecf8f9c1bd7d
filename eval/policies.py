"""POLICY on the command line: a run folder, or a baseline's name."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from backbones.backbone import Backbone
from backbones.errors import InputError
from backbones.latency_model import LatencyModel
from eval.runs import RunFolder
from policies.baselines import BASELINES, Planner
from policies.learned import ControllerPlanner, load_controller
from policies.milliseconds import MillisecondPlanner


def backbone_of(policies: list[str], backbone: str | None) -> str:
    """The backbone to evaluate on: the one asked for, else that of the run folders, else ``tiny``.

    Raises:
        InputError: runs of different backbones.
    """
    if backbone is not None:
        return backbone
    runs = [RunFolder(policy) for policy in policies if policy not in BASELINES and Path(policy).exists()]
    names = sorted({str(run.config().get("backbone", "tiny")) for run in runs})
    if len(names) > 1:
        raise InputError(f"the runs are for different backbones ({', '.join(names)}); evaluate them one by one")
    return names[0] if names else "tiny"


def load_planner(policy: str, backbone: Backbone, seed: int) -> Planner:
    """A planner by baseline name or run folder.

    Raises:
        InputError: neither.
    """
    if policy in BASELINES:
        return BASELINES[policy](backbone, seed)
    folder = RunFolder(policy)
    if not folder.is_run():
        raise InputError(f"unknown policy {policy!r}; use a run folder or one of {', '.join(BASELINES)}")
    return ControllerPlanner(load_controller(folder.path, backbone), backbone, folder.path.name)


def load_planners(
    policies: Sequence[str],
    backbone: Backbone,
    seed: int,
    milliseconds: Sequence[float] = (),
    latency_model: LatencyModel | None = None,
) -> list[Planner]:
    """The planners of the command line.

    Args:
        policies: baseline names and run folders.
        backbone: what they plan for.
        seed: of baselines that draw.
        milliseconds: limits of prefill; every policy that follows a budget then gives one planner for each.
        latency_model: predicts the prefill; needed with ``milliseconds``.
    """
    planners = [load_planner(policy, backbone, seed) for policy in policies]
    if latency_model is None:
        return planners
    limited: list[Planner] = []
    for policy, planner in zip(policies, planners, strict=True):
        if planner.budgeted:  # each limit gets a planner of its own: what one draws does not depend on the others
            limited += [
                MillisecondPlanner(load_planner(policy, backbone, seed), backbone, latency_model, limit)
                for limit in milliseconds
            ]
        else:
            limited.append(planner)
    return limited
