"""What each experiment compares.

An arm is a policy, or a training and the policy that it makes. Its name is what tables and plots call it, and means the
same in every experiment, so that experiments in one folder share what they have measured.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from eval.tune import baseline_of


@dataclass(frozen=True)
class Arm:
    """One thing that is compared with others.

    Attributes:
        name: an estimator's, for a controller of all three axes; followed by the axes where they are fewer.
        policy: as ``eval run`` takes it; ``{}`` stands for the arm's own run, ``{name}`` for that of another arm.
        script: what trains the run: ``train_rl`` or ``train_gumbel``; None: nothing is trained.
        options: of the script, with the same stand-ins.
        seeded: whether it differs from seed to seed; the others are evaluated once.
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


def of_axes(estimator: str, *axes: str) -> Arm:
    """A controller that decides on some axes; the others stay full."""
    return learned(f"{estimator} {' and '.join(axes)}", estimator, "--axes", *axes)


FULL = Arm("full", "full", seeded=False)
UNTRAINED = (Arm("random", "random@restored"), Arm("even", "even@restored", seeded=False))
"""On all three axes, their tokens laid out as those of controllers."""

ADALLAVA = (
    learned("adallava-l", "adallava-l", "--prefix-layers", "1"),
    learned("adallava-h", "adallava-h", "--prefix-layers", "1"),
    Arm("prumerge+ then adallava-l", "prumerge+:count=budget@0.5 then {adallava-l}"),
    Arm("fastv then adallava-l", "fastv:k=2@0.5 then {adallava-l}"),
)
"""Depth, width and depth, and depth after a token step that knows nothing of the controller."""

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

ESTIMATORS = ("rl", "gumbel", "soft-topk")

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
        *(of_axes(estimator, "tokens") for estimator in ESTIMATORS),
    ]


def dimensions(tuned: Mapping[str, str]) -> list[Arm]:
    """One, two and three dimensions, each trained by the same estimator, and AdaLLaVA with its disjoint chains."""
    few = (("tokens",), ("heads",), ("layers",), ("heads", "layers"))
    return [FULL, *UNTRAINED, *ADALLAVA, *(of_axes("rl", *axes) for axes in few), learned("rl", "rl")]


def training(tuned: Mapping[str, str]) -> list[Arm]:
    """RL against relaxations of the same controller on all three axes, and AdaLLaVA's."""
    after = learned("rl after gumbel", "rl", "--init-from", "{gumbel}")
    return [FULL, *UNTRAINED, *ADALLAVA, *(learned(estimator, estimator) for estimator in ESTIMATORS), after]


EXPERIMENTS = {"pruning": pruning, "dimensions": dimensions, "training": training}
TUNED = {"pruning": STATIC_TOKENS, "dimensions": (), "training": ()}
"""Baselines whose options are tuned first."""


def settings_of(names: Sequence[str], grid: Sequence[str]) -> list[str]:
    """The settings of a tuning grid that are of some baselines."""
    return [policy for policy in grid if baseline_of(policy) in names]
