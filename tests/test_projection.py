"""After projection no plan exceeds its budget, and a larger budget keeps a superset."""

from itertools import pairwise

import pytest
import torch

from maskgym.backbones import EncodingBank, InputError
from maskgym.envs.data.queries import DatasetQueries
from maskgym.policies.baselines import FullPlanner, RandomPlanner, random_plans
from maskgym.policies.planning.projection import budget_flops, least_share, project
from tests.conftest import make_dataset, random_masks


def encodings(backbone):
    source = DatasetQueries(make_dataset(), "made", "train")
    return EncodingBank(backbone, source).gather(range(12))


def draw(backbone, rows, seed, low=0.15):
    generator = torch.Generator().manual_seed(seed)
    encoding = encodings(backbone).rows(torch.randint(12, (rows,), generator=generator))
    confidence = torch.randn(rows, backbone.layout.size, generator=generator)
    budgets = low + (1 - low) * torch.rand(rows, generator=generator, dtype=torch.float64)
    return encoding, confidence, budgets


@pytest.mark.parametrize("seed", range(5))
def test_no_plan_exceeds_its_budget_and_none_drops_more_than_it_must(backbone, seed):
    encoding, confidence, budgets = draw(backbone, 200, seed)
    before = random_masks(backbone, 200, seed, keep=0.95)
    low = torch.full_like(budgets, 0.6) if backbone.layout.protected_layers else budgets
    budgets = budgets.maximum(low)
    after = project(backbone, before, confidence, budgets, encoding, controller_flops=1000)
    full = backbone.full_llm_flops(encoding)
    limits = budget_flops(budgets, full)
    assert (backbone.cost(encoding, after, 1000).llm <= limits).all()
    flat_before = backbone.layout.flatten(backbone.restrict(encoding, before))
    flat_after = backbone.layout.flatten(after)
    assert not (flat_after & ~flat_before).any(), "projection added a unit"
    dropped = flat_before & ~flat_after
    last = confidence.masked_fill(~dropped, -torch.inf).argmax(1)  # the most confident of the dropped
    for row in dropped.any(1).nonzero()[:, 0].tolist():
        kept = flat_after[row] & ~backbone.layout.protected()
        assert confidence[row, dropped[row]].max() <= confidence[row, kept].min(), "a more confident unit was dropped"
        again = flat_after[row].clone()
        again[last[row]] = True
        cost = backbone.cost(encoding.rows(torch.tensor([row])), backbone.layout.unflatten(again[None]), 1000).llm
        assert cost > limits[row], "one drop too many"


def test_a_larger_budget_never_makes_the_plan_smaller(backbone):
    encoding, confidence, _ = draw(backbone, 50, 0)
    plans = [
        backbone.layout.flatten(
            project(backbone, backbone.layout.full(50), confidence, torch.full((50,), budget), encoding)
        )
        for budget in (0.55, 0.6, 0.7, 0.8, 0.9, 1.0)
    ]
    for smaller, larger in pairwise(plans):
        assert not (smaller & ~larger).any()


def test_plans_within_budget_are_untouched(backbone):
    encoding, confidence, _ = draw(backbone, 20, 1)
    masks = backbone.layout.full(20)
    projected = project(backbone, masks, confidence, torch.ones(20), encoding)
    assert torch.equal(backbone.layout.flatten(projected), backbone.layout.flatten(backbone.full(encoding)))


def test_the_controllers_own_flops_are_charged(small):
    encoding, confidence, _ = draw(small, 10, 2)
    projected = project(small, small.layout.full(10), confidence, torch.ones(10), encoding, controller_flops=1)
    assert not small.layout.flatten(projected).all(1).any()


def test_an_impossible_budget_is_refused_with_the_least_possible_one(small):
    encoding, confidence, _ = draw(small, 1, 3)
    with pytest.raises(InputError, match="least budget here is 0") as caught:
        project(small, small.layout.full(1), confidence, torch.tensor([0.01]), encoding)
    least = float(str(caught.value).rsplit(" ", 1)[1])
    assert project(small, small.layout.full(1), confidence, torch.tensor([least + 1e-4]), encoding)


def test_the_least_share_is_accepted_and_a_smaller_one_is_not(backbone):
    encoding, confidence, _ = draw(backbone, 50, 3)
    least = least_share(backbone, encoding, controller_flops=1000)
    everything, full = backbone.layout.full(50), backbone.full_llm_flops(encoding)
    smallest = project(backbone, everything, confidence, least, encoding, controller_flops=1000)
    assert torch.equal(backbone.cost(encoding, smallest, 1000).llm, budget_flops(least, full))
    with pytest.raises(InputError, match="least budget here is"):
        project(backbone, everything, confidence, least - 1 / full, encoding, controller_flops=1000)


def test_random_plans_spend_their_budget_on_every_axis(small, source):
    encoding = EncodingBank(small, source).gather([0] * 400)
    budgets = torch.full((400,), 0.6, dtype=torch.float64)
    planner = RandomPlanner(small, seed=0)
    masks = planner.plan(encoding, budgets)
    spent = small.cost(encoding, masks).llm / small.full_llm_flops(encoding)
    assert float(spent.max()) <= 0.6
    assert float(spent.mean()) > 0.5
    free_layers = masks.layers[:, 1:]
    assert 0.1 < (~masks.tokens).float().mean() < 0.9
    assert (~free_layers).any()
    assert (~masks.heads[:, 1:] & free_layers[..., None]).any()


def test_random_plans_repeat_with_their_seed(small):
    encoding, _, budgets = draw(small, 30, 4, low=0.7)
    plans = [
        small.layout.flatten(random_plans(small, encoding, budgets, torch.Generator().manual_seed(seed)))
        for seed in (1, 1, 2)
    ]
    assert torch.equal(plans[0], plans[1])
    assert not torch.equal(plans[0], plans[2])


def test_full_planner_keeps_everything(small, source):
    encoding = EncodingBank(small, source).gather([0, 1])
    planner = FullPlanner(small)
    assert small.layout.flatten(planner.plan(encoding, torch.ones(2))).all()
    assert planner.controller_flops(encoding) == 0
