"""Time to first token of one query, part by part, with all visual tokens and with few."""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from maskgym.backbones.backbone import Backbone
from maskgym.backbones.encodings.encoding import Encoding, Query
from maskgym.backbones.plans.masks import Masks
from maskgym.eval.bench.shapes import QUESTION
from maskgym.eval.measure.latency import measure
from maskgym.policies.baselines import FullPlanner
from maskgym.policies.controller.learned import ControllerPlanner
from maskgym.policies.controller.network import ControllerConfig, TwoLevelController
from maskgym.policies.planner import PlannerWrapper


class _KeepingFirst(PlannerWrapper):
    """Plans of the first so many visual tokens, after a controller has run: for its time, not for its choice."""

    def __init__(self, backbone: Backbone, keep: int):
        torch.manual_seed(0)
        config = ControllerConfig.for_layout(backbone.layout, backbone.hidden)
        super().__init__(ControllerPlanner(TwoLevelController(config), backbone, "first tokens"))
        self.backbone, self.keep = backbone, keep

    def plan(self, encoding: Encoding, budgets_B: Tensor) -> Masks:
        self.planner.plan(encoding, budgets_B)
        masks = self.backbone.full(encoding)
        masks.tokens[:, self.keep :] = False
        return masks


def first_token_figures(backbone: Backbone, repeats: int, keep: int = 64) -> list[tuple[str, float]]:
    """Time to first token of one query with all tokens and with ``keep``: encode, controller, prefill.

    DiffPrune (2026) prints 0.68 of the FLOPs cut for the prefill and 0.49 for the time to first token, at 64 tokens of
    LLaVA-1.5-7B on an A6000 in half precision.
    """
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (336, 336, 3), dtype=np.uint8))
    query = Query("noise", image, QUESTION)
    pruned_by = _KeepingFirst(backbone, keep)
    full = measure(backbone, FullPlanner(backbone), [[query]], 1.0, repeats=repeats)
    pruned = measure(backbone, pruned_by, [[query]], 0.5, repeats=repeats)
    encoding = backbone.encode([query])
    plan = pruned_by.plan(encoding, torch.tensor([0.5], dtype=torch.float64, device=backbone.device))
    costs = (
        backbone.cost(encoding, backbone.full(encoding), new_tokens=1),
        backbone.cost(encoding, plan, pruned_by.controller_flops(encoding), new_tokens=1),
    )
    cut = {name: float(getattr(costs[0], name) / getattr(costs[1], name)) for name in ("prefill", "total")}
    return [
        (f"prefill_speedup_over_cut_{keep}_tokens", full.prefill.p50 / pruned.prefill.p50 / cut["prefill"]),
        (f"ttft_speedup_over_cut_{keep}_tokens", full.ttft.p50 / pruned.ttft.p50 / cut["total"]),
        *((f"{part}_ms_full", getattr(full, part).p50) for part in ("encode", "prefill", "ttft")),
        *((f"{part}_ms_{keep}_tokens", getattr(pruned, part).p50) for part in ("controller", "prefill", "ttft")),
    ]
