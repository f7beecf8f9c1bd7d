"""The order in which an untrained controller lets units go."""

import pytest
import torch

from maskgym.backbones import EncodingBank
from maskgym.policies.controller.learned import ControllerPlanner
from maskgym.policies.controller.network import ControllerConfig, TwoLevelController
from maskgym.policies.planning.even import EvenPlanner, even_order


@pytest.mark.parametrize("part", [0.25, 0.5, 0.75])
@pytest.mark.parametrize("side", [8, 24])
def test_every_part_of_the_order_lies_evenly_over_the_image(side, part):
    """Tokens kept in any quadrant, and gaps around any token, against tokens drawn at random."""
    kept = (even_order(side * side) > 1 - part).view(side, side)
    drawn = torch.rand(400, side, side, generator=torch.Generator().manual_seed(0)) < part

    def unevenness(grids):
        blocks = torch.nn.functional.avg_pool2d(grids[:, None].float(), 4, stride=1)
        return blocks.std((1, 2, 3))

    assert int(kept.sum()) == round(part * side * side)
    assert float(unevenness(kept[None])) < float(unevenness(drawn).quantile(0.01))


def test_tokens_that_are_no_square_are_even_in_reading_order():
    kept = (even_order(60) > 0.75).nonzero()[:, 0]
    assert len(kept) == 15 and (kept.diff() >= 2).all() and (kept.diff() <= 6).all()


def test_an_untrained_controller_makes_this_plan(small, source):
    encoding = EncodingBank(small, source).gather(range(6))
    torch.manual_seed(0)
    config = ControllerConfig.for_layout(small.layout, small.hidden)
    untrained = ControllerPlanner(TwoLevelController(config), small, "x")
    budgets = torch.tensor([0.5, 0.6, 0.7, 0.8, 0.9, 1.0], dtype=torch.float64)
    charged = untrained.controller_flops(encoding) / small.full_llm_flops(encoding)
    plans = [untrained.plan(encoding, budgets), EvenPlanner(small).plan(encoding, (budgets - charged).clamp_max(1))]
    one, other = (small.layout.flatten(plan) for plan in plans)
    assert (one != other).float().mean() < 0.03, "but for the noise in the untrained weights"
    kept = [plan.tokens.sum(1) for plan in plans]
    assert (kept[1].diff() >= 0).all() and bool((plans[1].layers).all())
