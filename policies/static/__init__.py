"""Published rules that choose visual tokens without training, and the plain ones that they must beat."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from maskgym.policies.static.diversity import CDPrunerPlanner, DivPrunePlanner
from maskgym.policies.static.inside import FastVPlanner
from maskgym.policies.static.plain import RandomTokenPlanner, StridePlanner
from maskgym.policies.static.progressive import PyramidDropPlanner, SparseVLMPlanner
from maskgym.policies.static.prumerge import PruMergePlanner
from maskgym.policies.static.restore import RestorePlanner
from maskgym.policies.static.searched import SearchedPlanner
from maskgym.policies.static.tower import SUBSTITUTE
from maskgym.policies.static.visionzip import VisionZipPlanner

TOWER_RULES: dict[str, Callable[..., Any]] = {
    "prumerge": partial(PruMergePlanner, plus=False),
    "prumerge+": partial(PruMergePlanner, plus=True),
    "visionzip": VisionZipPlanner,
}

STATIC: dict[str, Callable[..., Any]] = {
    "random-tokens": RandomTokenPlanner,
    "stride": StridePlanner,
    "static": SearchedPlanner,
    **{name: partial(rule, cls=True) for name, rule in TOWER_RULES.items()},
    **{name + SUBSTITUTE: partial(rule, cls=False) for name, rule in TOWER_RULES.items()},
    "fastv": partial(FastVPlanner, mean=False),
    "fastv-mean": partial(FastVPlanner, mean=True),
    "pyramiddrop": PyramidDropPlanner,
    "sparsevlm": SparseVLMPlanner,
    "divprune": DivPrunePlanner,
    "cdpruner": CDPrunerPlanner,
    "restore": RestorePlanner,
}
"""By the name on the command line; each takes a backbone, a seed, and its options."""
