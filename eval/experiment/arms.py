"""What each experiment compares.

An arm is a policy, or a training and the policy that it makes. Its name is what tables and plots call it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from eval.tune import baseline_of


@dataclass(frozen=True)
class Arm:
    """One thing that is compared with others.

    Attributes:
        name: unique in its experiment.
        policy: as ``eval run`` takes it; ``{}`` stands for the arm's own run, ``{name}`` for that of another arm.
        script: what trains the run: ``train_rl`` or ``train_gumbel``; None: nothing is trained.
        options: of the script, with the same stand-ins.
        budgeted: whether it follows budgets; the others are evaluated once.
    """

    name: str
    policy: str = "{}"
    script: str | None = None
    options: tuple[str, ...] = ()
    seeded: bool = True

    def needs(self, arms: Sequence[Arm]) -> list[str]:
        """The other arms whose runs it uses."""
        text = " ".join((self.policy, *self.options))
        return [arm.name for arm in arms if f"{{{arm.name}}}" in text]


def learned(name: str, estimator: str, *options: str) -> Arm:
    """A trained controller, by PPO (``rl``) or an estimator of ``train_gumbel.py``."""
    if estimator == "rl":
        return Arm(name, script="train_rl", options=options)
    return Arm(name, script="train_gumbel", options=("--estimator", estimator, *options))


FULL = Arm("full", "full", seeded=False)

STATIC_TOKENS = (
    "random-tokens",
    "stride",
    "prumerge",
    "prumerge+",
    "fastv",
    "visionzip",
    "sparsevlm",
    "pyramiddrop",
    "divprune",
    "cdpruner",
)
"""Baselines of the first experiment that are tuned before."""

AS_PUBLISHED = ("prumerge", "prumerge+")
"""Those that set their own number of tokens are also run so."""


def pruning(tuned: Mapping[str, str]) -> list[Arm]:
    """Learned against static token pruning.

    Args:
        tuned: by baseline, the policy with its best options.
    """
    drawn = ("random-tokens",)
    return [
        FULL,
        *(Arm(name, tuned.get(name, name), seeded=name in drawn) for name in STATIC_TOKENS),
        *(Arm(f"{name}, as published", name, seeded=False) for name in AS_PUBLISHED),
        *(learned(f"{name} tokens", name, "--axes", "tokens") for name in ("rl", "gumbel", "soft-topk")),
    ]


def dimensions(tuned: Mapping[str, str]) -> list[Arm]:
    """One, two and three dimensions, each trained by the same estimator, and AdaLLaVA with its disjoint chains."""
    prefix = ("--prefix-layers", "1")
    return [
        FULL,
        Arm("random", "random"),
        learned("adallava-l", "adallava-l", *prefix),
        learned("adallava-h", "adallava-h", *prefix),
        Arm("prumerge+ then adallava-l", "prumerge+:count=budget@0.5 then {adallava-l}"),
        Arm("fastv then adallava-l", "fastv:k=2@0.5 then {adallava-l}"),
        learned("tokens", "rl", "--axes", "tokens"),
        learned("heads", "rl", "--axes", "heads"),
        learned("layers", "rl", "--axes", "layers"),
        learned("heads and layers", "rl", "--axes", "heads", "layers"),
        learned("all three", "rl"),
    ]


def training(tuned: Mapping[str, str]) -> list[Arm]:
    """RL against relaxations of the same controller on all three axes."""
    return [
        FULL,
        Arm("random", "random"),
        learned("rl", "rl"),
        learned("gumbel", "gumbel"),
        learned("soft-topk", "soft-topk"),
        learned("rl after gumbel", "rl", "--init-from", "{gumbel}"),
    ]


EXPERIMENTS = {"pruning": pruning, "dimensions": dimensions, "training": training}
TUNED = {"pruning": STATIC_TOKENS, "dimensions": (), "training": ()}
"""Baselines whose options are tuned first."""


def settings_of(names: Sequence[str], grid: Sequence[str]) -> list[str]:
    """The settings of a tuning grid that are of some baselines."""
    return [policy for policy in grid if baseline_of(policy) in names]
