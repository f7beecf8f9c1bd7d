"""Relaxed decisions: what is sampled, what is priced, and how far the gradients are from the exact ones."""

from dataclasses import replace

import pytest
import torch

from maskgym.backbones import EncodingBank, InputError
from maskgym.backbones.plans.masks import AXES
from maskgym.eval.studies.gradients import FixedLogits, gradient_quality, gradient_table, smallest_case
from maskgym.policies.controller.decisions import Decider
from maskgym.policies.controller.learned import ControllerPlanner
from maskgym.policies.controller.network import ControllerConfig, TwoLevelController
from maskgym.policies.planning.projection import budget_flops
from maskgym.policies.relaxation.estimators import cost_loss, gumbel_straight_through, soft_top_k
from maskgym.policies.relaxation.training import RelaxationSettings

ROWS = 8


def decider_of(backbone, seed=0, **sizes):
    torch.manual_seed(seed)
    config = ControllerConfig.for_layout(
        backbone.layout, backbone.hidden, **{"width": 8, "initial_logit": 0.5, **sizes}
    )
    controller = TwoLevelController(config)
    for parameter in controller.parameters():
        parameter.data.add_(0.15 * torch.randn_like(parameter))
    return Decider(controller, backbone)


@pytest.fixture
def encoding(small, source):
    return EncodingBank(small, source).gather(range(ROWS))


BUDGETS = torch.linspace(0.6, 0.95, ROWS, dtype=torch.float64)


@pytest.mark.parametrize("fit", [False, True])
def test_straight_through_gates_are_bits_with_the_sigmoids_gradient(small, encoding, fit):
    decider = decider_of(small, initial_logit=3.0)
    relaxed = gumbel_straight_through(decider, encoding, BUDGETS, 1.0, fit)
    gates = relaxed.gates_BA
    assert ((gates.detach() == 0) | (gates.detach() == 1)).all()
    assert ((relaxed.soft_BA > 0) & (relaxed.soft_BA <= 1)).all()
    protected = small.layout.protected()
    assert (gates[:, protected] == 1).all() and (gates[:, ~protected] == 0).any()
    spent = small.cost(encoding, small.layout.unflatten(gates.detach().bool()), decider.controller_flops(encoding)).llm
    within = spent <= budget_flops(BUDGETS, small.full_llm_flops(encoding))
    assert within.all() == fit, "without projection some of these plans are over their budgets"
    parameters = [*decider.controller.parameters()]
    of_gates, of_soft = (
        torch.autograd.grad(x.sum(), parameters, retain_graph=True, allow_unused=True) for x in (gates, relaxed.soft_BA)
    )
    for one, two in zip(of_gates, of_soft, strict=True):
        assert (one is None and two is None) or torch.allclose(one, two)


def test_gumbel_keeps_with_the_probability_of_the_logit(small, encoding):
    logits = torch.linspace(-2, 2, small.layout.size)
    config = ControllerConfig.for_layout(small.layout, small.hidden)
    rows = encoding.rows(torch.zeros(4000, dtype=torch.long))
    torch.manual_seed(0)
    decider = Decider(FixedLogits(config, logits.expand(4000, -1).clone()), small)
    kept = gumbel_straight_through(decider, rows, torch.ones(4000), 0.7, fit=False).gates_BA.mean(0)
    free = ~small.layout.protected()
    assert torch.allclose(kept[free], logits.sigmoid()[free], atol=0.04)


@pytest.mark.parametrize("axes", [AXES, ("tokens",), ("layers",)])
@pytest.mark.parametrize("temperature", [0.2, 1.0])
def test_a_soft_top_k_costs_its_budget(small, encoding, temperature, axes):
    decider = decider_of(small, rule="fill", initial_logit=4.0, axes=axes)
    relaxed = soft_top_k(decider, encoding, 0.9 * BUDGETS, temperature)
    spent = relaxed.flops(decider, encoding) / small.full_llm_flops(encoding)
    assert torch.allclose(spent, 0.9 * BUDGETS, atol=1e-4)
    looser = soft_top_k(decider, encoding, 0.9 * BUDGETS + 0.04, temperature)
    assert (looser.gates_BA.mean(1) > relaxed.gates_BA.mean(1)).all()


@pytest.mark.parametrize("positions", ["original", "restored"])
def test_relaxed_flops_are_the_cost_models_at_bits(small, encoding, positions):
    decider = decider_of(small, rule="fill", positions=positions)
    bits_BA = decider.decide(decider.read(encoding, BUDGETS), sample=True).bits_BA
    bits_BA[0] = True
    masks = replace(small.layout.unflatten(bits_BA), survivors=decider.survivors(encoding))
    assert torch.equal(
        decider.flops(encoding, decider.gates(bits_BA.float())), small.cost(encoding, masks).llm.double()
    )


def test_a_filling_plan_keeps_as_many_tokens_as_it_would_on_average(small, encoding):
    decider = decider_of(small, rule="fill", initial_spread=1.0)
    rows = encoding.rows(torch.zeros(3000, dtype=torch.long))
    for budget in (0.5, 0.7, 0.9):
        budgets = torch.full((3000,), budget, dtype=torch.float64)
        drawn, best = (
            decider.decide(decider.read(rows, budgets), sample).bits_BA[:, small.layout.level1].sum(1)
            for sample in (True, False)
        )
        assert abs(float(drawn.float().mean()) - int(best[0])) < 0.6 and drawn.float().std() > 0.5


def test_the_gradient_through_the_shift_is_exact(small, encoding):
    """Against finite differences of one logit, of tokens and of heads and layers: the others' gates move too, for the
    budget is shared."""
    config = ControllerConfig.for_layout(small.layout, small.hidden, rule="fill")
    torch.manual_seed(0)
    logits = torch.randn(1, small.layout.size, dtype=torch.float64)
    logits[:, small.layout.level1] += 2
    row, budget = encoding.rows(torch.tensor([0])), torch.tensor([0.7], dtype=torch.float64)
    weights = torch.randn(small.layout.size, dtype=torch.float64)

    def value(at):
        fixed = FixedLogits(config, at.clone())
        return (soft_top_k(Decider(fixed, small), row, budget, 0.5).gates_BA * weights).sum(), fixed.logits_BA

    out, leaf = value(logits)
    out.backward()
    for place in (0, 7, 20, 30):
        ends = []
        for step in (-1e-4, 1e-4):
            moved = logits.clone()
            moved[0, place] += step
            ends.append(float(value(moved)[0].detach()))
        assert float(leaf.grad[0, place]) == pytest.approx((ends[1] - ends[0]) / 2e-4, rel=1e-3, abs=1e-6)


def test_a_cold_soft_top_k_is_what_the_fill_rule_executes(small, encoding):
    config = ControllerConfig.for_layout(small.layout, small.hidden, rule="fill")
    torch.manual_seed(1)
    logits = torch.randn(ROWS, small.layout.size)
    logits[:, small.layout.level1] += 2
    fixed = FixedLogits(config, logits)
    planner = ControllerPlanner.__new__(ControllerPlanner)
    planner.decider = Decider(fixed, small)
    executed = small.layout.flatten(planner.plan(encoding, 0.9 * BUDGETS))
    soft = soft_top_k(planner.decider, encoding, 0.9 * BUDGETS, 0.01).gates_BA
    unlike = ((soft > 0.5) != executed) & ~small.layout.protected()
    # The unit at the threshold is half there, and if that is a layer, so is what hangs on it.
    assert unlike.float().mean() < 0.05
    hot = soft_top_k(planner.decider, encoding, 0.9 * BUDGETS, 5.0).gates_BA
    assert ((hot > 0.5) != executed).float().mean() > 0.07


@pytest.mark.parametrize("axes", [("tokens",), ("layers",), ("heads", "layers")])
@pytest.mark.parametrize("estimator", ["gumbel", "soft-topk"])
def test_an_axis_left_out_stays_full(small, encoding, axes, estimator):
    decider = decider_of(small, axes=axes, rule="fill" if estimator == "soft-topk" else "threshold")
    budgets = torch.full((ROWS,), 0.9, dtype=torch.float64)
    relax = gumbel_straight_through if estimator == "gumbel" else soft_top_k
    gates = relax(decider, encoding, budgets, 1.0).gates(decider)
    plan = ControllerPlanner(decider.controller, small, "x").plan(encoding, budgets)
    for axis in AXES:
        assert bool((getattr(gates, axis) == 1).all()) == (axis not in axes)
        assert bool(getattr(plan, axis).all()) or axis in axes


def test_prices_by_hand():
    spent, budgets = torch.tensor([0.8, 0.2]), torch.tensor([0.4, 0.5])
    assert float(cost_loss("penalty", spent, budgets)) == pytest.approx(0.5)
    assert float(cost_loss("budget", spent, budgets, under=0.1)) == pytest.approx((1.0 + 0.03) / 2)


def test_schedules():
    settings = RelaxationSettings(temperatures=(4.0, 1.0), cost_weight=3.0, warm_up=0.5)
    assert [settings.temperature(x) for x in (0, 0.5, 1)] == pytest.approx([4, 2, 1])
    assert [settings.price(x) for x in (0, 0.25, 0.5, 1)] == pytest.approx([0, 1.5, 3, 3])


@pytest.mark.parametrize(
    ("option", "value", "words"),
    [
        ("estimator", "arm", "--estimator is arm; it must be one of gumbel, soft-topk"),
        ("temperatures", (0.5, 1.0), "two with 0 < last <= first"),
        ("temperatures", (1.0, 0.0), "two with 0 < last <= first"),
        ("temperatures", (float("nan"), 1.0), "two with 0 < last <= first"),
        ("noise", -1.0, "--noise is -1.0; it must be at least 0"),
        ("cost", "hinge", "one of budget, penalty"),
        ("cost_weight", -2.0, "--cost-weight is -2.0"),
        ("warm_up", 1.5, "--warm-up is 1.5; it must be a share"),
        ("distillation", -0.1, "--distillation is -0.1"),
    ],
)
def test_settings_out_of_range_are_named(option, value, words):
    with pytest.raises(InputError, match=words):
        RelaxationSettings(**{option: value})


def test_estimators_against_the_exact_gradient():
    """The policy gradient is unbiased; straight-through is not, and the colder the noisier."""
    backbone, query = smallest_case()
    torch.manual_seed(3)
    logits = torch.randn(backbone.layout.size)
    table = gradient_quality(backbone, query, logits, backbone.answer_ids("red"), samples=4096)
    assert all(name in gradient_table(table) for name in table)
    exact, cold, hot = (
        table[name]
        for name in ("policy gradient", "straight-through, temperature 0.5", "straight-through, temperature 2")
    )
    standard_error = exact["spread"] / 4096**0.5
    assert exact["bias"] < 3 * standard_error and exact["cosine"] > 0.9
    assert hot["bias"] > 5 * hot["spread"] / 4096**0.5, "straight-through's bias is real"
    assert cold["spread"] > hot["spread"]
