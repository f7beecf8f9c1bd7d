"""Budgets in milliseconds: each query gets the largest share whose plan is predicted to be fast enough."""

import pytest
import torch

from maskgym.backbones import EncodingBank, InputError
from maskgym.backbones.latency_model import LatencyModel
from maskgym.eval.measure.evaluate import evaluate
from maskgym.eval.measure.report import table
from maskgym.policies.baselines import FullPlanner, RandomPlanner
from maskgym.policies.controller.learned import ControllerPlanner
from maskgym.policies.controller.network import ControllerConfig, TwoLevelController
from maskgym.policies.planning.projection import least_share, project
from maskgym.policies.wrappers.milliseconds import ATTEMPTS, MillisecondPlanner
from tests.conftest import build


def known_model(backbone):
    """Mostly FLOPs, so that a token more or less can be seen."""
    return LatencyModel("here", backbone.name, (0.05, 0.02, 1.0, 1000.0, 1000.0), 0.0)


@pytest.fixture(scope="module")
def encoding(small, source):
    return EncodingBank(small, source).gather(range(12))


@pytest.fixture(scope="module")
def full_ms(small, encoding):
    return known_model(small).predict(small, encoding, small.full(encoding))


class FixedPlanner(RandomPlanner):
    """The same confidences at every call, so that a larger share keeps a superset; notes the shares asked for."""

    def __init__(self, backbone, least=0.0):
        super().__init__(backbone)
        self.least, self.shares = least, []

    def plan(self, encoding, budgets_B):
        self.shares.append(budgets_B)
        if (budgets_B < self.least).any():
            raise InputError(f"no plan below {self.least}")
        generator = torch.Generator().manual_seed(0)
        confidence = torch.randn(self.backbone.layout.size, generator=generator).expand(len(encoding), -1)
        return project(self.backbone, self.backbone.full(encoding), confidence, budgets_B, encoding)


def limited(planner, backbone, milliseconds):
    return MillisecondPlanner(planner, backbone, known_model(backbone), milliseconds)


def learned(backbone):
    torch.manual_seed(0)
    config = ControllerConfig.for_layout(backbone.layout, backbone.hidden, width=8)
    return ControllerPlanner(TwoLevelController(config), backbone, "rl")


@pytest.mark.parametrize("share", [0.75, 0.9])
def test_random_plans_keep_to_the_limit_and_use_it(small, encoding, full_ms, share):
    limit = share * float(full_ms.min())
    masks, shares = limited(RandomPlanner(small), small, limit).choose(encoding, torch.ones(12))
    predicted = known_model(small).predict(small, encoding, masks)
    assert (predicted <= limit).all() and float(predicted.mean()) > 0.9 * limit
    assert (shares < 1).all()
    at_share = small.cost(encoding, masks).llm / small.full_llm_flops(encoding)
    assert (at_share <= shares).all(), "the shares are not those of the plans"


@pytest.mark.slow
def test_the_share_is_the_largest_on_a_grid_that_fits(small, encoding, full_ms):
    limit = 0.8 * float(full_ms.min())
    _, shares = limited(FixedPlanner(small), small, limit).choose(encoding, torch.ones(12))
    best = torch.zeros(12)
    for step in range(1, 201):
        share = torch.full((12,), step / 200, dtype=torch.float64)
        if (share >= least_share(small, encoding)).all():
            fits = known_model(small).predict(small, encoding, FixedPlanner(small).plan(encoding, share)) <= limit
            best = torch.where(fits, share, best)
    assert (shares >= best - 1 / 1024).all() and (shares < best + 1 / 200).all()


def test_a_trained_controller_keeps_to_the_limit_and_pays_for_every_plan(small, encoding, full_ms):
    limit = 0.8 * float(full_ms.min())
    planner = learned(small)
    masks = limited(planner, small, limit).plan(encoding, torch.ones(12))
    assert (known_model(small).predict(small, encoding, masks) <= limit).all()
    flops = limited(planner, small, limit).controller_flops(encoding)
    assert torch.equal(flops, 12 * planner.controller_flops(encoding))
    counted = FixedPlanner(small)
    limited(counted, small, limit).plan(encoding, torch.ones(12))
    assert len(counted.shares) == ATTEMPTS == 12


def test_a_generous_limit_gives_the_plan_of_the_whole_budget(small, encoding, full_ms):
    planner, flat = learned(small), small.layout.flatten
    for upper in (0.7, 1.0):
        budgets = torch.full((12,), upper, dtype=torch.float64)
        masks, shares = limited(planner, small, 2 * float(full_ms.max())).choose(encoding, budgets)
        assert torch.equal(flat(masks), flat(planner.plan(encoding, budgets))) and torch.equal(shares, budgets)


def test_seeds_make_random_plans_repeat(small, encoding, full_ms):
    limit = 0.8 * float(full_ms.min())
    plans = [
        small.layout.flatten(limited(RandomPlanner(small, seed), small, limit).plan(encoding, torch.ones(12)))
        for seed in (1, 1, 2)
    ]
    assert torch.equal(plans[0], plans[1]) and not torch.equal(plans[0], plans[2])


def test_shares_that_a_planner_refuses_are_too_small(small, encoding, full_ms):
    limit = 0.8 * float(full_ms.min())
    free, shares = limited(FixedPlanner(small), small, limit).choose(encoding, torch.ones(12))
    picky = FixedPlanner(small, least=float(shares.min()) - 0.01)
    masks, _ = limited(picky, small, limit).choose(encoding, torch.ones(12))
    assert torch.equal(small.layout.flatten(masks), small.layout.flatten(free))
    assert min(float(asked.min()) for asked in picky.shares) < picky.least, "nothing was refused"
    with pytest.raises(InputError, match="is below the fastest prefill that policy 'random' has for query 'q"):
        limited(FixedPlanner(small, least=0.99), small, limit).choose(encoding, torch.ones(12))
    with pytest.raises(InputError, match="no plan below 2"):
        limited(FixedPlanner(small, least=2), small, limit).choose(encoding, torch.ones(12))


def test_plans_without_layers_are_not_chosen(source):
    backbone = build(protected_layers=())
    encoding = EncodingBank(backbone, source).gather(range(12))
    full_ms = known_model(backbone).predict(backbone, encoding, backbone.full(encoding))
    one = backbone.layout.full(12)
    one.layers[:, 1:] = False
    one_ms = known_model(backbone).predict(backbone, encoding, one)
    masks = limited(RandomPlanner(backbone), backbone, float((one_ms.max() + full_ms.min()) / 2)).plan(
        encoding, torch.ones(12)
    )
    assert masks.layers.any(1).all()


def test_an_impossible_limit_is_refused_with_the_least_possible_one(small, encoding):
    with pytest.raises(InputError, match=r"a budget of 0\.1 ms is below .* for query 'q\d+' on here, 0") as caught:
        limited(RandomPlanner(small), small, 0.1).plan(encoding, torch.ones(12))
    least = float(str(caught.value).split(", ")[1].split(" ")[0])
    assert limited(RandomPlanner(small), small, least * 1.01).plan(encoding, torch.ones(12))
    for limit in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(InputError, match="is no time; give milliseconds above 0"):
            limited(RandomPlanner(small), small, limit)


def test_records_name_the_limit_the_share_and_the_prediction(small, source, full_ms):
    limit, bank = 0.8 * float(full_ms.min()), EncodingBank(small, source)
    planners = [limited(RandomPlanner(small), small, limit), FullPlanner(small)]
    records = [record for planner in planners for record in evaluate(planner, small, bank, (0.5,), progress=False)]
    tight, full = records
    assert tight["policy"] == "random" and tight["budget_ms"] == limit and tight["budget_violations"] == 0
    assert 0 < tight["budget"] < 1 and 0.8 * limit < tight["predicted_ms"] <= limit
    assert full["budget"] == 1 and "budget_ms" not in full and "predicted_ms" not in full
    lines = table(records).splitlines()
    assert "| budget ms " in lines[0] and "| predicted ms " in lines[0] and len({len(line) for line in lines}) == 1
    assert "budget ms" not in table([full])


class Spendthrift(MillisecondPlanner):
    def choose(self, encoding, budgets_B):
        return self.backbone.full(encoding), budgets_B


def test_plans_over_the_limit_are_counted(small, source, full_ms):
    planner = Spendthrift(RandomPlanner(small), small, known_model(small), 0.8 * float(full_ms.min()))
    assert evaluate(planner, small, EncodingBank(small, source), (1.0,), progress=False)[0]["budget_violations"] == 12
