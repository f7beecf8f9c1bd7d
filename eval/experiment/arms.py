"""What each experiment compares.

An arm is a policy, or a training and the policy that it makes. Its name is what tables and plots call it, and means the
same in every experiment, so that experiments in one folder share what they have measured.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path

from maskgym.backbones.plans.masks import AXES
from maskgym.eval.studies.tune import baseline_of


@dataclass(frozen=True)
class Arm:
    """One thing that is compared with others.

    Attributes:
        name: an estimator's, for a controller of all three axes; followed by the axes where they are fewer.
        policy: as ``eval run`` takes it; ``{}`` stands for the arm's own run, ``{name}`` for that of another arm.
        script: what trains the run: ``train-rl`` or ``train-gumbel`` of the console command; None: nothing is trained.
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


@dataclass(frozen=True)
class Prepared:
    """What arms are made from.

    Attributes:
        tuned: by baseline, the policy with its best options.
        plan: file of the searched static plan, with which controllers begin.
    """

    tuned: Mapping[str, str]
    plan: Path


def relaxed(name: str, estimator: str, *options: str) -> Arm:
    """What an estimator of ``train_gumbel.py`` trains."""
    return Arm(name, script="train-gumbel", options=("--estimator", estimator, *options))


def controller(prepared: Prepared, estimator: str, *axes: str) -> Arm:
    """A two-level controller, trained by PPO (``rl``) or an estimator of ``train_gumbel.py``; of some axes, or all."""
    options = ("--initial-plan", str(prepared.plan), *(("--axes", *axes) if axes else ()))
    name = f"{estimator} {' and '.join(axes)}" if axes else estimator
    return Arm(name, script="train-rl", options=options) if estimator == "rl" else relaxed(name, estimator, *options)


def untrained(prepared: Prepared) -> list[Arm]:
    """Plans of all three axes that do not look: drawn, even, and searched for."""
    static = f"static:plan={prepared.plan}"
    searched = [Arm("static", static, seeded=False), Arm("static, merged", f"{static}@merge", seeded=False)]
    return [FULL, Arm("random", "random"), Arm("even", "even", seeded=False), *searched]


FULL = Arm("full", "full", seeded=False)

ADALLAVA = (
    relaxed("adallava-l", "adallava-l", "--prefix-layers", "1"),
    relaxed("adallava-h", "adallava-h", "--prefix-layers", "1"),
    Arm("prumerge+ then adallava-l", "prumerge+:count=budget,neighbours=8@original@0.5 then {adallava-l}"),
    Arm("fastv then adallava-l", "fastv:k=2@0.5 then {adallava-l}"),
)
"""Depth, width and depth, and depth after a token step that knows nothing of the controller; PruMerge+ as it was best
on validation queries of scenes, at half of the tokens."""

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


def pruning(prepared: Prepared) -> list[Arm]:
    """Learned against static token pruning."""
    drawn = ("random-tokens",)
    return [
        FULL,
        *(Arm(name, prepared.tuned.get(name, name), seeded=name in drawn) for name in STATIC_TOKENS),
        *(Arm(f"{name}, as published", name, seeded=False) for name in AS_PUBLISHED),
        *(controller(prepared, estimator, "tokens") for estimator in ESTIMATORS),
    ]


def dimensions(prepared: Prepared) -> list[Arm]:
    """One, two and three dimensions, each trained by the same estimator, and AdaLLaVA with its disjoint chains."""
    fewer = [axes for count in (1, 2) for axes in combinations(AXES, count)]
    own = [controller(prepared, "rl", *axes) for axes in (*fewer, ())]
    return [*untrained(prepared), *ADALLAVA, *own]


def training(prepared: Prepared) -> list[Arm]:
    """RL against relaxations of the same controller on all three axes, and AdaLLaVA's."""
    after = Arm("rl after gumbel", script="train-rl", options=("--init-from", "{gumbel}"))
    own = [controller(prepared, estimator) for estimator in ESTIMATORS]
    return [*untrained(prepared), *ADALLAVA, *own, after]


EXPERIMENTS = {"pruning": pruning, "dimensions": dimensions, "training": training}
TUNED = {"pruning": STATIC_TOKENS, "dimensions": (), "training": ()}
"""Baselines whose options are tuned first."""


def settings_of(names: Sequence[str], grid: Sequence[str]) -> list[str]:
    """The settings of a tuning grid that are of some baselines."""
    return [policy for policy in grid if baseline_of(policy) in names]
