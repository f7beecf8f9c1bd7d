"""What every policy is charged is what PyTorch's counter sees of choosing and answering together, to the last FLOP."""

from dataclasses import replace

import pytest
import torch

from maskgym.backbones import EncodingBank, InputError
from maskgym.backbones.latency_model import LatencyModel
from maskgym.eval.policies import load_planner
from maskgym.policies.adallava.scheduler import AdaLlavaConfig, AdaLlavaPlanner, AdaLlavaScheduler
from maskgym.policies.controller.learned import ControllerPlanner
from maskgym.policies.controller.network import ControllerConfig, TwoLevelController
from maskgym.policies.static.searched import SearchedOrder
from maskgym.policies.wrappers.chain import THEN, ChainPlanner
from maskgym.policies.wrappers.layout import LaidOutPlanner
from maskgym.policies.wrappers.milliseconds import MillisecondPlanner
from maskgym.policies.wrappers.replies import Planned
from tests.conftest import build, slow_but
from tests.test_cost import counted

BUDGETS = (0.45, 0.75, 1.0)
LAYOUTS = {"two-level, merged": {"merge": True}, "two-level, restored": {"positions": "restored"}}


def two_level(backbone, **options):
    torch.manual_seed(0)
    config = ControllerConfig.for_layout(backbone.layout, backbone.hidden, width=8, **options)
    return ControllerPlanner(TwoLevelController(config), backbone, "two-level")


def adallava(backbone, variant):
    torch.manual_seed(1)
    layout = backbone.layout
    scheduler = AdaLlavaScheduler(AdaLlavaConfig(layout.layers, layout.heads, backbone.hidden, 1, variant))
    torch.nn.init.normal_(scheduler.scheduler.weight)
    return AdaLlavaPlanner(scheduler, backbone, f"adallava-{variant}")


def searched(backbone, folder):
    layout = backbone.layout
    order = [[unit] for unit in torch.randperm(layout.size, generator=torch.Generator().manual_seed(0)).tolist()]
    protected = layout.protected()
    order = [unit for unit in order if not protected[unit[0]]]
    shape = (layout.tokens, layout.layers, layout.heads)
    SearchedOrder(backbone.name, shape, "made", "train", 1, order, (), ()).save(folder / "static.json")
    return f"static:plan={folder / 'static.json'}"


OWN = {
    "two-level": two_level,
    "two-level, threshold": lambda backbone: two_level(backbone, rule="threshold"),
    "two-level, tokens": lambda backbone: two_level(backbone, axes=("tokens",)),
    "two-level, heads and layers": lambda backbone: two_level(backbone, axes=("heads", "layers")),
    **{name: lambda backbone, own=own: two_level(backbone, **own) for name, own in LAYOUTS.items()},
    "two-level@merge": lambda backbone: LaidOutPlanner(two_level(backbone), backbone, None, True),
    "adallava-l": lambda backbone: adallava(backbone, "l"),
    "adallava-h": lambda backbone: adallava(backbone, "h"),
}
STATIC = [
    *("full", "random", "even", "static", "static@merge", "random-tokens"),
    *("stride", "stride@0.5", "stride@merge", "stride@restored", "stride@renumbered"),
    *("prumerge", "prumerge:count=budget", "prumerge+", "prumerge+:count=budget", "prumerge@mean-attention"),
    "prumerge+:count=budget,neighbours=2@original",
    *("visionzip", "visionzip@mean-attention", "visionzip:contextual=0"),
    *("fastv:k=1", "fastv:k=1,r=0.5", "fastv-mean:k=1", "pyramiddrop", "sparsevlm"),
    *("divprune", "divprune@merge", "cdpruner", "cdpruner@0.25", "restore", "restore:base=cdpruner"),
]
CHAINS = [
    first + THEN + second
    for first, second in (
        ("prumerge+:count=budget@0.5", "adallava-l"),
        ("prumerge", "two-level"),
        ("fastv:k=1@0.5", "adallava-l"),
        ("fastv:k=2@0.5", "adallava-h"),
        ("fastv:k=1@0.5", "two-level"),
        ("fastv:k=1@0.5", "divprune"),
        ("visionzip@0.5", "adallava-h"),
        ("stride@0.75@merge", "two-level"),
        ("stride@0.5@restored", "adallava-h"),
        ("stride@1@restored", "two-level"),
        ("restore@0.75", "random"),
        ("stride@0.5@merge", "full"),
    )
]


def planner_for(policy, backbone, folder):
    first, then, second = policy.partition(THEN)
    if then:
        parts = (planner_for(part, backbone, folder) for part in (first, second))
        return ChainPlanner(*parts, backbone)
    if policy in OWN:
        return OWN[policy](backbone)
    return load_planner(policy.replace("static", searched(backbone, folder)), backbone, 0)


def signal_flops(backbone, query):
    """What the tower is asked besides, when an image is encoded."""
    image = backbone.encode_images([query.image])[0]
    return counted(lambda: backbone.encode_images([query.image])) - image.vision_flops - image.projector_flops


def decided(planner, encoding, budget):
    """The plan and what choosing it took; None for a budget that cannot be met."""
    plans, budgets_B = [], torch.tensor([budget], dtype=torch.float64)
    try:
        flops = counted(lambda: plans.append(planner.plan(encoding, budgets_B)))
    except InputError:
        return None
    return plans[0], flops


def answered(planner, backbone, encoding, plan, budget, longest):
    """The reply, and what answering took."""
    planned, replies = Planned(planner, backbone, encoding, plan, torch.tensor([budget])), []
    flops = counted(lambda: replies.extend(planned.answer(longest)))
    return replies[0], flops


FAST = ("random", "prumerge+:count=budget", "fastv:k=1", "divprune", "two-level", "adallava-h")


@pytest.mark.parametrize("policy", slow_but(FAST, (*STATIC, *OWN, *CHAINS)))
def test_the_charge_is_what_is_computed_and_within_the_budget(source, tmp_path, policy):
    backbone = build()
    planner, met = planner_for(policy, backbone, tmp_path), []
    encoding, asked = EncodingBank(backbone, source).gather([2]), signal_flops(backbone, source[2])
    assert (asked > 0) == bool(planner.signals)
    for budget in BUDGETS if planner.budgeted else (1.0,):
        found = decided(planner, encoding, budget)
        if found is None:
            continue
        plan, choosing = found
        if plan.making is not None and int(plan.making):
            choosing += asked  # taken once an image, for all who ask; charged to the plans that are made from it
        reply, answering = answered(planner, backbone, encoding, plan, budget, 3)
        assert choosing + answering == reply.spent_llm_flops, budget
        assert reply.llm_flops <= budget * int(backbone.full_llm_flops(encoding)) or not planner.budgeted, budget
        met.append(budget)
    assert len(met) >= (2 if planner.budgeted else 1) and met[-1] == 1.0


def test_what_ends_an_answer_is_spent_too(monkeypatch, small, source):
    encoding, full = EncodingBank(small, source).gather([0]), load_planner("full", small, 0)
    plan = small.full(encoding)
    third = small.answer(encoding, plan, 3).tokens[0][2]
    monkeypatch.setattr(small.model.generation_config, "eos_token_id", third)
    reply, answering = answered(full, small, encoding, plan, 1.0, 8)
    assert answering == reply.spent_llm_flops
    assert answering == int(small.cost(encoding, plan, new_tokens=3).llm)


@pytest.mark.parametrize("policy", ["two-level", "adallava-h", "divprune"])
@pytest.mark.slow
def test_limits_in_milliseconds_charge_all_that_was_tried(source, tmp_path, policy):
    backbone = build()
    encoding = EncodingBank(backbone, source).gather([2])
    model = LatencyModel("here", backbone.name, (0.05, 0.02, 1.0, 1000.0, 1000.0), 0.0)
    limit = 0.9 * float(model.predict(backbone, encoding, backbone.full(encoding)))
    planner = MillisecondPlanner(planner_for(policy, backbone, tmp_path), backbone, model, limit)
    plan, choosing = decided(planner, encoding, 1.0)
    reply, answering = answered(planner, backbone, encoding, plan, 1.0, 1)
    assert choosing + answering == reply.llm_flops


def test_a_decision_that_is_not_run_costs_nothing(small, source):
    """AdaLLaVA's token is made when the plan runs, however often it was priced."""
    encoding = EncodingBank(small, source).gather([2])
    planner = adallava(small, "h")
    plan, choosing = decided(planner, encoding, 0.75)
    assert choosing == planner.planning_flops(encoding) == 0
    without = counted(lambda: small.prefill(encoding, replace(plan, midway=None)))
    assert counted(lambda: small.prefill(encoding, plan)) - without > planner.controller_flops(encoding)
