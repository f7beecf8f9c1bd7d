"""AdaLLaVA's scheduler (Xu et al., ICCV 2025): a token that carries the budget goes with the prompt through the first
layers, and its state there chooses exactly as many layers, or groups of heads, as the budget pays for.

Built from the paper and what is known of its code, with three departures. The budget is a share of FLOPs (``levels``
has the original's layer count); a head slot takes its slice of the MLP with it, where the original draws as many heads
as slices separately; batches and grouped queries work.

Shape legend: B rows, D hidden width, L layers, K layers that are decided on, H head slots, h choices in a layer.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from maskgym.backbones.backbone import Backbone
from maskgym.backbones.encodings.encoding import Encoding
from maskgym.backbones.plans.cost import mlp_flops
from maskgym.backbones.plans.masks import Masks
from maskgym.backbones.plans.midway import Midway
from maskgym.backbones.soft_decoder import Gates
from maskgym.common.errors import InputError
from maskgym.policies.planner import Planner
from maskgym.policies.planning.bisection import most_that_fits
from maskgym.policies.planning.projection import budget_flops

VARIANTS = ("l", "h")
LEVELS = ("flops", "layers")
FREQUENCIES = 128


@dataclass(frozen=True)
class AdaLlavaConfig:
    """A scheduler's sizes; saved as ``controller.json``.

    Attributes:
        layers, heads: of the layout that it decides on.
        hidden: D, the width of the backbone's decoder.
        prefix_layers: layers that always run; it decides on entering the next.
        variant: ``"l"``: whole layers; ``"h"``: groups of heads with their MLP slices, a layer without any is skipped.
        group: head slots of a layer that are chosen together, for ``"h"``.
        levels: how a budget becomes a number of units. ``"flops"``: as many as it pays for; ``"layers"``: the
            original's, so many of all layers, prefix included, whatever they cost.

    Raises:
        InputError: naming what does not fit the layout.
    """

    layers: int
    heads: int
    hidden: int
    prefix_layers: int
    variant: str = "l"
    group: int = 1
    levels: str = "flops"

    def __post_init__(self) -> None:
        if self.variant not in VARIANTS:
            raise InputError(f"AdaLLaVA's variant is {self.variant!r}; it must be one of {', '.join(VARIANTS)}")
        if self.levels not in LEVELS:
            raise InputError(f"AdaLLaVA's levels are {self.levels!r}; they must be one of {', '.join(LEVELS)}")
        if not 1 <= self.prefix_layers < self.layers:
            raise InputError(
                f"{self.prefix_layers} prefix layers do not fit a backbone of {self.layers} layers; give 1 to "
                f"{self.layers - 1}"
            )
        if self.group < 1 or self.heads % self.group:
            raise InputError(f"groups of {self.group} heads do not fit {self.heads} head slots; give a divisor of them")

    @property
    def choices(self) -> int:
        """h: what is chosen from in a layer."""
        return 1 if self.variant == "l" else self.heads

    @property
    def units_per_layer(self) -> int:
        return 1 if self.variant == "l" else self.heads // self.group

    @property
    def units(self) -> int:
        """All that can be kept beyond the prefix."""
        return (self.layers - self.prefix_layers) * self.units_per_layer


class AdaLlavaScheduler(nn.Module):
    """Makes the latency token, and chooses by its state: the ``Chooser`` of a ``Midway`` decision.

    Args:
        config: its sizes.
    """

    def __init__(self, config: AdaLlavaConfig):
        super().__init__()
        self.config = config
        d = config.hidden
        self.latency = nn.Sequential(
            nn.LayerNorm(2 * FREQUENCIES), nn.Linear(2 * FREQUENCIES, d), nn.GELU(), nn.Linear(d, d)
        )
        self.scheduler = nn.Linear(d, (config.layers - config.prefix_layers) * config.choices)

    def start_from(self, embedding_D: Tensor) -> None:
        """Let the token start as a copy of one that the backbone knows. The answer is predicted at it, which a frozen
        backbone cannot learn."""
        last = self.latency[-1]
        assert isinstance(last, nn.Linear)
        with torch.no_grad():
            last.weight.mul_(0.01)
            last.bias.copy_(embedding_D)

    def token(self, units_B: Tensor) -> Tensor:
        """(B, D) the latency token of so many units."""
        share_B = units_B.float() / (self.config.units + 1)
        steps = torch.arange(FREQUENCIES, device=units_B.device)
        angles = 2 * math.pi * share_B[:, None] * 10000 ** (-steps / FREQUENCIES)
        return self.latency(torch.cat([angles.sin(), angles.cos()], dim=1))

    def draw(self, state_BD: Tensor, units_B: Tensor, temperature: float = 1.0, noise: bool = False) -> Gates:
        """Exactly so many units, with straight-through gradients; what the prefix keeps is everything.

        Args:
            state_BD: of the latency token, on entering the first layer that is decided on.
            units_B: how many.
            temperature: of the softmax that gives the gradients.
            noise: Gumbel noise, new in every round.
        """
        c = self.config
        logits_BKh = self.scheduler(state_BD.float()).unflatten(1, (-1, c.choices))
        chosen_BKh = exactly(logits_BKh, units_B, 1 if c.variant == "l" else c.group, temperature, noise)
        before_BPh = chosen_BKh.new_ones(len(chosen_BKh), c.prefix_layers, c.choices)
        all_BLh = torch.cat([before_BPh, chosen_BKh], dim=1)
        if c.variant == "l":
            return Gates(all_BLh[..., :0, 0], torch.ones_like(all_BLh).expand(-1, -1, c.heads), all_BLh[..., 0])
        return Gates(all_BLh[..., :0, 0], all_BLh, (all_BLh.detach() > 0.5).any(2).to(all_BLh.dtype))

    @torch.no_grad()
    def choose(self, state_BD: Tensor, units_B: Tensor) -> tuple[Tensor, Tensor]:
        gates = self.draw(state_BD, units_B)
        return gates.effective_heads > 0.5, gates.layers > 0.5

    def flops(self) -> int:
        """FLOPs (2 x MACs) of one decision; what the extra token costs in the decoder is part of the plan's."""
        c = self.config
        outputs = self.scheduler.out_features
        return mlp_flops(1, 2 * FREQUENCIES, c.hidden, c.hidden) + mlp_flops(1, c.hidden, outputs)

    def config_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self.config)


def exactly(logits_BKh: Tensor, units_B: Tensor, group: int, temperature: float, noise: bool) -> Tensor:
    """(B, K, h) exactly ``units_B`` units of ``group`` choices kept: bits, with straight-through gradients.

    Round after round, one of the choices that are left names a layer, and ``group`` that are left in it are kept.
    """
    kept_BKh = torch.zeros_like(logits_BKh)
    used_BKh = torch.zeros_like(logits_BKh, dtype=torch.bool)
    for number in range(int(units_B.max()) if len(units_B) else 0):
        active_B11 = (number < units_B)[:, None, None]
        layer_BK1 = _pick(logits_BKh.flatten(1), used_BKh.flatten(1), temperature, noise)
        layer_BK1 = layer_BK1.view_as(logits_BKh).sum(2, keepdim=True)
        for _ in range(group):
            new_BKh = layer_BK1 * _pick(logits_BKh, used_BKh, temperature, noise) * active_B11
            kept_BKh = kept_BKh + new_BKh
            used_BKh = used_BKh | (new_BKh.detach() > 0.5)
    return kept_BKh


def _pick(logits: Tensor, used: Tensor, temperature: float, noise: bool) -> Tensor:
    """One along the last axis of those not used, as a one-hot with the gradient of a softmax."""
    if noise:
        uniform = torch.rand_like(logits).clamp(1e-6, 1 - 1e-6)
        logits = logits - (-uniform.log()).log()
    # not -inf: where all are used the result is multiplied by 0, which would not help against NaN
    soft = (logits / temperature).masked_fill(used, -1e9).softmax(-1)
    hard = F.one_hot(soft.argmax(-1), soft.shape[-1]).to(soft.dtype)
    return hard + (soft - soft.detach())


class AdaLlavaPlanner(Planner):
    """Plans that a scheduler completes inside the decoder, each within its budget.

    Args:
        scheduler: trained.
        backbone: prices and runs the plans.
        name: in records.
    """

    def __init__(self, scheduler: AdaLlavaScheduler, backbone: Backbone, name: str):
        outside = [layer for layer in backbone.layout.protected_layers if layer >= scheduler.config.prefix_layers]
        if outside:
            raise InputError(
                f"layer {outside[0]} is protected, but AdaLLaVA decides on all from layer "
                f"{scheduler.config.prefix_layers} on; protect layers of its prefix only"
            )
        self.scheduler, self.backbone, self.name = scheduler.to(backbone.device), backbone, name

    @torch.no_grad()
    def plan(self, encoding: Encoding, budgets_B: Tensor) -> Masks:
        """Plans within their budgets.

        Raises:
            InputError: a budget below what the prefix costs.
        """
        return self.plan_units(encoding, self.units(encoding, budgets_B))

    def plan_units(self, encoding: Encoding, units_B: Tensor) -> Masks:
        """Plans of so many units; before the decision the costliest of that many stand for those that it will take."""
        config = self.scheduler.config
        full = self.backbone.full(encoding)
        rank_KH = self._costliest_first().to(units_B.device)
        kept_BKH = rank_KH < units_B[:, None, None] * (1 if config.variant == "l" else config.group)
        heads = torch.cat([full.heads[:, : config.prefix_layers], kept_BKH], dim=1)
        layers = heads.any(2)
        return Masks(full.tokens, heads, layers, midway=Midway(config.prefix_layers, units_B, self.scheduler))

    def units(self, encoding: Encoding, budgets_B: Tensor) -> Tensor:
        """(B,) int64: the units that budgets, shares of the full plan's LLM FLOPs, pay for.

        Raises:
            InputError: a budget below what the prefix costs.
        """
        config = self.scheduler.config
        budgets_B = budgets_B.to(self.backbone.device, torch.float64)
        if config.levels == "layers":
            whole_B = (config.layers * config.units_per_layer * budgets_B).floor().long()
            return (whole_B - config.prefix_layers * config.units_per_layer).clamp(0, config.units)
        full_B = self.backbone.full_llm_flops(encoding)
        limits_B = budget_flops(budgets_B, full_B)
        none_B = torch.zeros(len(encoding), dtype=torch.int64, device=self.backbone.device)
        least_B = self._flops(encoding, none_B)
        if bool((least_B > limits_B).any()):
            row = int((least_B - limits_B).argmax())
            raise InputError(
                f"budget {float(budgets_B[row]):g} is below what the {config.prefix_layers} prefix layers of "
                f"{self.name} cost, {float(least_B[row] / full_B[row]):.3f}; give more, or train with fewer "
                "--prefix-layers"
            )
        return most_that_fits(
            lambda units_B: self._flops(encoding, units_B) <= limits_B, none_B, torch.full_like(none_B, config.units)
        )

    def least_share(self, encoding: Encoding) -> Tensor:
        """(B,) float64: the smallest budgets for which there is a plan."""
        none_B = torch.zeros(len(encoding), dtype=torch.int64, device=self.backbone.device)
        full_B = self.backbone.full_llm_flops(encoding)
        return (self._flops(encoding, none_B) + 1).double() / full_B

    def controller_flops(self, encoding: Encoding) -> int:
        return self.scheduler.flops()

    def planning_flops(self, encoding: Encoding) -> int:
        """Nothing: token and scheduler are computed when the plan runs."""
        return 0

    def _flops(self, encoding: Encoding, units_B: Tensor) -> Tensor:
        plans = self.plan_units(encoding, units_B)
        return self.backbone.cost(encoding, plans, self.scheduler.flops()).llm

    def _costliest_first(self) -> Tensor:
        """(K, H) int64: an order of heads in which the first n cost no less than any n, or of layers."""
        config, shape = self.scheduler.config, self.backbone.decoder.shape
        layers, heads = config.layers - config.prefix_layers, config.heads
        if config.variant == "l":
            return torch.arange(layers)[:, None].expand(layers, heads)
        # a first head costs more than those that follow it in its key-value group; else the MLP slices differ by one
        widest = sorted(range(heads), key=lambda head: -shape.mlp_width[head])
        first = {head // shape.slots_per_group: head for head in reversed(widest)}.values()
        entries = [(layer, head) for head in widest for layer in range(layers)]
        entries.sort(key=lambda entry: entry[1] not in first)
        rank_KH = torch.empty(layers, heads, dtype=torch.int64)
        for rank, (layer, head) in enumerate(entries):
            rank_KH[layer, head] = rank
        return rank_KH
