"""Trained controllers as planners, and their files."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save
from torch import Tensor

from maskgym.backbones.backbone import Backbone
from maskgym.backbones.encodings.encoding import Encoding
from maskgym.backbones.expected_length import check_expected, described
from maskgym.backbones.loading.fingerprint import fingerprint
from maskgym.backbones.plans.masks import Masks
from maskgym.common.atomic import write_atomically, write_json
from maskgym.common.errors import InputError
from maskgym.common.plain_files import MALFORMED, check_inside, read_json
from maskgym.common.tensor_files import tensor_shapes
from maskgym.policies.adallava.scheduler import AdaLlavaConfig, AdaLlavaPlanner, AdaLlavaScheduler
from maskgym.policies.controller.decisions import Decider
from maskgym.policies.controller.network import ControllerConfig, TwoLevelController
from maskgym.policies.planner import Planner

WEIGHTS, SIZES = "controller.safetensors", "controller.json"
MADE_FOR = "backbone_fingerprint"
"""In ``controller.json``: fingerprint of the weights that it was trained for. Older files lack it and go unchecked."""
EXPECTED = "expected_answer_tokens"
"""In ``controller.json``: the answer length that plans were priced at, where it was not one token."""


class ControllerPlanner(Planner):
    """Plans by a trained controller, each projected into its budget.

    Args:
        controller: the controller.
        backbone: the backbone it was trained for.
        name: in records.
    """

    def __init__(self, controller: TwoLevelController, backbone: Backbone, name: str):
        self.decider = Decider(controller.to(backbone.device).eval(), backbone)
        self.name = name

    @torch.no_grad()
    def plan(self, encoding: Encoding, budgets_B: Tensor) -> Masks:
        return self.decider.plan(self.decider.read(encoding, budgets_B))

    def controller_flops(self, encoding: Encoding) -> Tensor:
        return self.decider.controller_flops(encoding)


Controller = TwoLevelController | AdaLlavaScheduler

_KINDS: dict[str, tuple[Callable[..., Any], Callable[..., Controller]]] = {
    "two-level": (ControllerConfig, TwoLevelController),
    "adallava": (AdaLlavaConfig, AdaLlavaScheduler),
}


def planner_of(controller: Controller, backbone: Backbone, name: str) -> Planner:
    """The planner that a controller of either kind makes."""
    if isinstance(controller, AdaLlavaScheduler):
        return AdaLlavaPlanner(controller, backbone, name)
    return ControllerPlanner(controller, backbone, name)


def save_controller(controller: Controller, folder: Path, backbone: Backbone) -> None:
    """Write ``controller.safetensors`` and ``controller.json``; the latter names the backbone's weights and the answer
    length that it prices plans at, too."""
    kind = next(name for name, (_, module) in _KINDS.items() if type(controller) is module)
    weights = save({name: tensor.contiguous() for name, tensor in controller.state_dict().items()})
    write_atomically(folder / WEIGHTS, weights)
    sizes = {"kind": kind, **controller.config_dict(), MADE_FOR: fingerprint(backbone.model)}
    if backbone.expected_answer_tokens != 1:
        sizes[EXPECTED] = backbone.expected_answer_tokens
    write_json(folder / SIZES, sizes)


def load_controller(
    folder: Path,
    backbone: Backbone,
    any_weights: bool = False,
    remedy: str = "name the backbone that it was trained on, or train one for this",
) -> Controller:
    """Read a controller back.

    Args:
        folder: where it lies.
        backbone: what it shall plan for.
        any_weights: whether a backbone of the same sizes will do, as a start of further training.
        remedy: what to do about another backbone, for messages.

    Raises:
        InputError: a missing or unreadable file, a link out of the folder, or a controller for another backbone: of
            another layout, or with other weights.
    """
    for name in (SIZES, WEIGHTS):
        check_inside(folder / name, folder)
    try:
        sizes: dict[str, Any] = read_json(folder / SIZES)
        make_config, make = _KINDS[sizes.pop("kind", "two-level")]
        made_for, expected = sizes.pop(MADE_FOR, None), sizes.pop(EXPECTED, 1)
        config = make_config(**sizes)
        shapes = tensor_shapes(folder / WEIGHTS)
        expected = check_expected(expected)
    except MALFORMED as error:
        raise InputError(f"no readable controller in {str(folder)!r} ({error}); is it a finished run?") from error
    layout = backbone.layout
    sizes = {"tokens": layout.tokens, "layers": layout.layers, "heads": layout.heads, "hidden": backbone.hidden}
    sizes = {name: size for name, size in sizes.items() if hasattr(config, name)}
    mine, theirs = tuple(getattr(config, name) for name in sizes), tuple(sizes.values())
    if mine != theirs:
        raise InputError(
            f"the controller in {str(folder)!r} is for ({', '.join(sizes)}) = {mine}; "
            f"backbone {backbone.name!r} has {theirs}; {remedy}"
        )
    if made_for is not None and not any_weights and made_for != (here := fingerprint(backbone.model)):
        raise InputError(
            f"the controller in {str(folder)!r} was trained for other weights (fingerprint {made_for}) than those of "
            f"backbone {backbone.name!r} ({here}); {remedy}"
        )
    if shapes != _shapes(make, config):
        raise InputError(f"the weights in {str(folder / WEIGHTS)!r} do not fit {SIZES}; restore both, or train again")
    weights = load_file(folder / WEIGHTS)
    odd = [name for name, weight in weights.items() if not weight.is_floating_point() or not weight.isfinite().all()]
    if odd:
        raise InputError(
            f"the weights {odd[0]!r} in {str(folder / WEIGHTS)!r} are of {weights[odd[0]].dtype} or not finite; "
            "restore the file, or train again"
        )
    controller = make(config)
    controller.load_state_dict(weights)
    if expected != backbone.expected_answer_tokens and not any_weights:
        here = described(backbone.expected_answer_tokens)
        print(
            f"the controller in {str(folder)!r} was trained with plans priced at {described(expected)} an answer; here "
            f"they are priced at {here}",
            file=sys.stderr,
        )
    return controller


def expectation_in(folder: Path) -> dict[str, Any]:
    """The option of a backbone that prices plans as a folder's controller was trained; none where it is the default, or
    where there is no readable controller yet."""
    try:
        check_inside(folder / SIZES, folder)
        sizes: dict[str, Any] = read_json(folder / SIZES)
        return {EXPECTED: sizes[EXPECTED]} if EXPECTED in sizes else {}
    except MALFORMED:
        return {}


def _shapes(make: Callable[..., Controller], config: Any) -> dict[str, tuple[int, ...]] | None:
    """The shapes of a controller's weights by name, found without taking memory for them; None if it cannot be."""
    try:
        with torch.device("meta"):
            return {name: tuple(weight.shape) for name, weight in make(config).state_dict().items()}
    except (RuntimeError, *MALFORMED):
        return None
