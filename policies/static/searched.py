"""The best plan that is the same for every query: units leave in an order that was searched for on other data.

Shape legend: A flat action length.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from maskgym.backbones.backbone import Backbone
from maskgym.backbones.encodings.encoding import Encoding
from maskgym.backbones.plans.masks import Masks
from maskgym.common.atomic import write_text
from maskgym.common.errors import InputError
from maskgym.common.plain_files import MALFORMED, read_json
from maskgym.policies.planner import Planner
from maskgym.policies.planning.projection import project


@dataclass(frozen=True)
class SearchedOrder:
    """In which order units leave, and how it was found.

    Attributes:
        backbone: its name.
        layout: tokens, layers, heads.
        data, split: of the queries searched on.
        queries: how many.
        order: units in the order in which they leave, each a list of flat-action numbers that leave together.
        flops: share of the full plan's LLM FLOPs that is left after each.
        divergence: from the full plan's answers after each, in nats.
    """

    backbone: str
    layout: tuple[int, int, int]
    data: str
    split: str
    queries: int
    order: Sequence[Sequence[int]]
    flops: Sequence[float]
    divergence: Sequence[float]

    def json(self) -> str:
        """What ``load`` reads."""
        return json.dumps(asdict(self)) + "\n"

    def save(self, path: Path) -> None:
        write_text(path, self.json())

    @classmethod
    def load(cls, path: Path) -> SearchedOrder:
        """Read a saved order.

        Raises:
            InputError: a missing or unreadable file.
        """
        try:
            fields = read_json(path)
            order = [[int(number) for number in unit] for unit in fields.pop("order")]
            layout = tuple(int(size) for size in fields.pop("layout"))
            if len(layout) != 3:
                raise ValueError("a layout has three sizes")
            return cls(order=order, layout=layout, **fields)
        except MALFORMED as error:
            raise InputError(
                f"no readable plan in {str(path)!r} ({error}); make one with: "
                "python -m maskgym.eval search-static --out FILE"
            ) from error

    def stays(self, backbone: Backbone) -> Tensor:
        """(A,) each unit's place in the order, infinite for those that never leave.

        Raises:
            InputError: an order for another layout.
        """
        layout = backbone.layout
        mine = (layout.tokens, layout.layers, layout.heads)
        numbers = [number for unit in self.order for number in unit]
        if self.layout != mine or min(numbers, default=0) < 0 or max(numbers, default=0) >= layout.size:
            raise InputError(
                f"the searched plan is for (tokens, layers, heads) = {self.layout}; backbone {backbone.name!r} has "
                f"{mine}: search anew with python -m maskgym.eval search-static --backbone {backbone.name} --out FILE"
            )
        stays_A = torch.full((layout.size,), float("inf"))
        for place, unit in enumerate(self.order):
            stays_A[list(unit)] = float(place)
        return stays_A

    def confidence(self, backbone: Backbone) -> Tensor:
        """(A,) the same from -1, the first to leave, to 1, the last and those that never leave."""
        return (2 * self.stays(backbone) / max(1, len(self.order) - 1) - 1).clamp_max(1.0)


class SearchedPlanner(Planner):
    """The best input-independent plan at each budget: units leave in the searched order until the plan fits.

    The order comes from ``maskgym.policies.static.search``, which follows GSOP and DOP (Liu et al., arXiv 2507.02909)
    over tokens, head slots and layers.

    Args:
        backbone: what the plans are for.
        seed: not used; nothing is drawn.
        plan: file that ``python -m maskgym.eval search-static --out`` wrote.

    Raises:
        InputError: an unreadable file, or one for another layout.
    """

    name = "static"

    def __init__(self, backbone: Backbone, seed: int = 0, plan: str = "static.json"):
        self.backbone = backbone
        self.stays_A = SearchedOrder.load(Path(plan)).stays(backbone)

    def plan(self, encoding: Encoding, budgets_B: Tensor) -> Masks:
        """Plans within their budgets.

        Raises:
            InputError: a budget below what the smallest plan costs.
        """
        device = encoding.visual_BND.device
        stays_BA = self.stays_A.to(device).expand(len(encoding), -1)
        return project(self.backbone, self.backbone.full(encoding), stays_BA, budgets_B.to(device), encoding)
