"""POLICY on the command line: a run or saved folder, a baseline with options, a planner of one's own, and variants.

fastv:k=2,r=0.5              a baseline with options
divprune@0.25                a quarter of the visual tokens, whatever the budget
runs/rl@merge@renumbered     how the kept tokens are laid out
my_rules:Mine:strength=3     a class or function of one's own, called with backbone, seed and options
prumerge+ then runs/rl       a token step, then a controller for the language model's side
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from maskgym.backbones.backbone import Backbone
from maskgym.backbones.expected_length import Expected, described
from maskgym.backbones.latency_model import LatencyModel
from maskgym.common.errors import InputError
from maskgym.common.naming import import_dotted, parse_options
from maskgym.common.run_folder import RunFolder
from maskgym.eval.saved import described_backbone, expected_by, followed, is_saved, load_saved_controller
from maskgym.policies.baselines import BASELINES
from maskgym.policies.controller.learned import load_controller, planner_of
from maskgym.policies.planner import Planner, adopted
from maskgym.policies.wrappers.chain import THEN, ChainPlanner
from maskgym.policies.wrappers.keep import KeepPlanner
from maskgym.policies.wrappers.layout import MERGE, POSITIONS, LaidOutPlanner
from maskgym.policies.wrappers.milliseconds import MillisecondPlanner

GIVEN = ("backbone", "seed")
"""What every planner is made with, and is no option."""


def backbone_of(policies: Sequence[str], backbone: str | None) -> tuple[str, dict[str, Any]]:
    """The backbone to evaluate on: the one asked for, else that of the folders, else ``tiny``; and its options, those
    that a saved folder has.

    Raises:
        InputError: folders for different backbones, or saved with different options.
    """
    folders = _folders(policies)
    options = {str(folder): described_backbone(folder)[1] for folder in folders if is_saved(folder)}
    first, own = next(iter(options.items()), ("", {}))
    other = next((folder for folder, theirs in options.items() if theirs != own), None)
    if other is not None:
        raise InputError(
            f"{first!r} and {other!r} were saved with different options of the backbone; evaluate them one by one"
        )
    if backbone is not None:
        return backbone, own
    names = sorted({followed(folder, described_backbone(folder)[0]) for folder in folders})
    if len(names) > 1:
        raise InputError(
            f"the controllers are for different backbones ({', '.join(names)}); evaluate them one by one, or, where "
            "these are copies of one, name it by --backbone"
        )
    return names[0] if names else "tiny", own


def expectation_of(policies: Sequence[str]) -> Expected | None:
    """The answer length that the folders' controllers priced plans at; None: no folder is among the policies.

    Raises:
        InputError: they differ.
    """
    found = {str(folder): expected_by(folder) for folder in _folders(policies)}
    if not found:
        return None
    first, expected = next(iter(found.items()))
    other = next((folder for folder, theirs in found.items() if theirs != expected), None)
    if other is None:
        return expected
    raise InputError(
        f"{first!r} and {other!r} were trained with plans priced at different answer lengths, {described(expected)} "
        f"and {described(found[other])}; give --answer-tokens, or evaluate them one by one"
    )


def _folders(policies: Sequence[str]) -> list[Path]:
    """Those with a controller, of all parts of the policies."""
    parts = [split_variants(part)[0] for policy in policies for part in policy.split(THEN)]
    return [Path(part) for part in parts if part not in BASELINES and os.path.exists(part)]


def split_variants(policy: str) -> tuple[str, list[str]]:
    """A policy without its ``@`` variants, and these."""
    base, variants = policy, list[str]()
    while "@" in base and _is_variant(base.rpartition("@")[2]):
        base, _, variant = base.rpartition("@")
        variants.insert(0, variant)
    return base, variants


def _is_variant(word: str) -> bool:
    return word in (MERGE, *POSITIONS) or word.replace(".", "", 1).isdecimal()


def with_layout(policy: str, merge: bool, positions: str | None) -> str:
    """A policy with a layout for what it keeps, but for one that names a layout itself, and for ``full``."""
    first, then, second = policy.partition(THEN)
    base, variants = split_variants(first)
    if base == "full" or {MERGE, *POSITIONS} & set(variants):
        return policy
    return "@".join([first, *[MERGE] * merge, *([] if positions is None else [positions])]) + then + second


def load_planner(policy: str, backbone: Backbone, seed: int, keep: float | None = None) -> Planner:
    """A planner as the command line names it.

    Args:
        policy: a run folder, what ``save_pretrained`` wrote, a baseline, or a planner of one's own, with options and
            variants, as for ``eval run``.
        backbone: what it plans for.
        seed: of baselines that draw.
        keep: share of the visual tokens to keep in place of a budget.

    Raises:
        InputError: an unknown name, an option or variant that it does not have.
    """
    first, then, second = policy.partition(THEN)
    if then:
        return ChainPlanner(load_planner(first, backbone, seed, keep), load_planner(second, backbone, seed), backbone)
    base, variants = split_variants(policy)
    planner = _load_base(base, backbone, seed)
    for share in [float(variant) for variant in variants if variant not in (MERGE, *POSITIONS)]:
        planner = KeepPlanner(planner, share)
        planner.name = f"{base}@{share:g}"
    if keep is not None and planner.budgeted:
        planner = KeepPlanner(planner, keep)
    positions = [variant for variant in variants if variant in POSITIONS]
    if len(positions) > 1:
        raise InputError(f"policy {policy!r} asks for positions {' and '.join(positions)}; give one of them")
    if positions or MERGE in variants:
        planner = LaidOutPlanner(planner, backbone, next(iter(positions), None), MERGE in variants)
    return planner


def _load_base(base: str, backbone: Backbone, seed: int) -> Planner:
    """A baseline, a planner of the user's own, or the controller of a run or saved folder."""
    name, _, options = base.partition(":")
    folder = Path(base)
    if name not in BASELINES and (is_saved(folder) or RunFolder(folder).is_run()):
        load = load_saved_controller if is_saved(folder) else load_controller
        return planner_of(load(folder, backbone), backbone, folder.name)
    if name in BASELINES:
        planner = BASELINES[name](backbone, seed, **parse_options(BASELINES[name], f"policy {name!r}", options, GIVEN))
        if options:
            planner.name = f"{planner.name}:{options}"
        return planner
    if not options:
        raise InputError(
            f"unknown policy {base!r}; use a run folder or one of {', '.join(BASELINES)}, or package.module:planner"
        )
    function, _, options = options.partition(":")
    make = import_dotted(f"{name}:{function}", f"policy {base!r}", "a function or class of backbone and seed")
    try:
        planner = make(backbone, seed, **parse_options(make, f"policy {base!r}", options, GIVEN))
    except InputError:
        raise
    except Exception as error:  # the user's own code: whatever it raises, say which policy it was
        raise InputError(f"policy {base!r} could not be made ({type(error).__name__}: {error}); mend it") from error
    lacks = [part for part in ("name", "plan") if not hasattr(planner, part)]
    if lacks:
        raise InputError(
            f"policy {base!r} is a {type(planner).__name__} without {lacks[0]!r}; see maskgym.policies.Planner"
        )
    return adopted(planner)


def load_planners(
    policies: Sequence[str],
    backbone: Backbone,
    seed: int,
    milliseconds: Sequence[float] = (),
    latency_model: LatencyModel | None = None,
    keep: Sequence[float] = (),
) -> list[Planner]:
    """The planners of the command line.

    Args:
        policies: see the top of this file.
        backbone: what they plan for.
        seed: of baselines that draw.
        milliseconds: limits of prefill; every policy that follows a budget then gives one planner for each.
        latency_model: predicts the prefill; needed with ``milliseconds``.
        keep: shares of the visual tokens; every policy that follows a budget then gives one planner for each.
    """
    planners: list[Planner] = []
    for policy in policies:
        load = partial(load_planner, policy, backbone, seed)
        if keep and load_planner(policy.partition(THEN)[0], backbone, seed).budgeted:
            planners += [load(share) for share in keep]
            continue
        plain = load()
        if latency_model is None or not plain.budgeted:
            planners.append(plain)
        else:  # each limit gets a planner of its own: what one draws does not depend on the others
            planners += [MillisecondPlanner(load(), backbone, latency_model, limit) for limit in milliseconds]
    return planners
