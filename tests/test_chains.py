"""A token step then a controller, shares of the tokens, layouts around planners: budgets, charges, what is seen."""

import pytest
import torch

from maskgym.backbones import EncodingBank, InputError, Masks
from maskgym.backbones.latency_model import LatencyModel
from maskgym.backbones.plans.survivors import POSITIONS
from maskgym.eval.measure.evaluate import evaluate
from maskgym.eval.measure.latency import measure
from maskgym.eval.policies import load_planner, load_planners, with_layout
from maskgym.policies.baselines import RandomPlanner, random_plans
from maskgym.policies.controller.learned import ControllerPlanner
from maskgym.policies.controller.network import ControllerConfig, TwoLevelController
from maskgym.policies.planner import PlannerWrapper, adopted
from maskgym.policies.planning.projection import budget_flops
from maskgym.policies.static.inside import FastVPlanner
from maskgym.policies.wrappers.chain import ATTEMPTS, ChainPlanner
from maskgym.policies.wrappers.keep import KeepPlanner
from maskgym.policies.wrappers.layout import LaidOutPlanner
from maskgym.policies.wrappers.milliseconds import ATTEMPTS as TRIES
from maskgym.policies.wrappers.milliseconds import MillisecondPlanner
from maskgym.policies.wrappers.replies import Planned

ROWS = [0, 1, 2, 3, 6, 7]
BUDGETS = torch.tensor([0.45, 0.5, 0.6, 0.7, 0.8, 0.5], dtype=torch.float64)


@pytest.fixture(scope="module")
def encoding(small, source):
    small.listen(["cls-last"])
    return EncodingBank(small, source).gather(ROWS)


def learned(backbone):
    torch.manual_seed(0)
    config = ControllerConfig.for_layout(backbone.layout, backbone.hidden, width=8)
    return ControllerPlanner(TwoLevelController(config), backbone, "rl")


@pytest.mark.parametrize("tokens", ["prumerge", "stride@0.25", "divprune@0.5@merge", "fastv:k=1,r=0.5"])
@pytest.mark.parametrize("llm", ["layers", "heads", "learned"])
def test_both_keep_one_budget(small, encoding, tokens, llm):
    second = learned(small) if llm == "learned" else RandomPlanner(small, axes=(llm,))
    first = load_planner(tokens, small, 0)
    chain = ChainPlanner(first, second, small)
    budgets = (BUDGETS + 0.1).clamp_max(1) if tokens.startswith("fastv") else BUDGETS
    masks = chain.plan(encoding, budgets)
    cost = small.cost(encoding, masks, chain.controller_flops(encoding))
    assert (cost.llm <= budget_flops(budgets, small.full_llm_flops(encoding))).all()
    alone = first.plan(encoding, torch.ones(6))
    assert not (masks.tokens & ~alone.tokens).any() and len(masks.stages) == len(alone.stages)
    if llm != "learned":
        assert torch.equal(masks.tokens, alone.tokens), "the controller's side has touched the tokens"
    with torch.no_grad():
        together, _ = small.prefill(encoding, masks)
        for row in range(6):
            part = torch.tensor([row])
            single, _ = small.prefill(encoding.rows(part), masks[row : row + 1])
            assert torch.allclose(single[0], together[row], atol=1e-4)


def test_the_controller_sees_what_the_token_step_has_left(small, encoding):
    class Watching(RandomPlanner):
        seen = ()

        def plan(self, encoding, budgets_B):
            self.seen = (*self.seen, (encoding, budgets_B))
            return super().plan(encoding, budgets_B)

    watching = Watching(small, axes=("layers",))
    first = load_planner("prumerge", small, 0)
    ChainPlanner(first, watching, small).plan(encoding, BUDGETS)
    ((seen, shares),) = watching.seen
    alone = first.plan(encoding, torch.ones(6))
    assert torch.equal(seen.visual_valid_BN, alone.tokens)
    kept = alone.tokens[0]
    assert torch.equal(seen.visual_BND[0, kept], alone.survivors.tokens[0, kept]), "merged tokens are what is there"
    assert (shares > BUDGETS).all(), "of a shorter sequence the same FLOPs are a larger share"


def test_where_the_controller_cannot_price_stages_it_tries_and_every_plan_is_charged(small, encoding):
    first, second = FastVPlanner(small, k=1, r=0.75), learned(small)
    chain = ChainPlanner(first, second, small)
    masks = chain.plan(encoding, BUDGETS + 0.1)
    own = torch.as_tensor(second.controller_flops(encoding))
    assert torch.equal(masks.making, (ATTEMPTS - 1) * own) and torch.equal(chain.controller_flops(encoding), own)
    spent = small.cost(encoding, masks, own).llm / small.full_llm_flops(encoding)
    plain = RandomPlanner(small, axes=("heads",))
    used = small.cost(encoding, ChainPlanner(first, plain, small).plan(encoding, BUDGETS + 0.1)).llm
    assert float((used / small.full_llm_flops(encoding) / (BUDGETS + 0.1)).mean()) > 0.75, (
        "the stage's savings are lost"
    )
    assert (spent <= BUDGETS + 0.1).all()


def test_budgets_that_the_token_step_takes_whole_are_named(small, encoding):
    with pytest.raises(InputError, match=r"budget 1e-06 is below what the token step of policy 'prumerge then random'"):
        load_planner("prumerge then random", small, 0).plan(encoding, torch.full((6,), 1e-6, dtype=torch.float64))


def test_unbudgeted_parts_make_an_unbudgeted_chain(small, encoding):
    chain = load_planner("stride@0.5 then full", small, 0)
    assert not chain.budgeted and chain.name == "stride@0.5 then full"
    masks = chain.plan(encoding, torch.ones(6))
    assert masks.tokens.sum(1).tolist() == [8] * 6 and masks.heads.all() and masks.layers.all()


def test_signals_and_notes_pass_through(small):
    kept = KeepPlanner(load_planner("visionzip", small, 0), 0.25)
    laid_out = LaidOutPlanner(kept, small, "original")
    chain = ChainPlanner(laid_out, RandomPlanner(small), small)
    limited = MillisecondPlanner(chain, small, LatencyModel("here", "test", (1.0,) * 5, 0.0), 3.0)
    for planner in (kept, laid_out, chain, limited):
        assert planner.signals == ("cls-features",) and planner.notes["keep"] == 0.25
    assert limited.notes["budget_ms"] == 3.0 and RandomPlanner(small).signals == ()


class Bare:
    """A planner of one's own with nothing but what it must have."""

    name = "bare"

    def __init__(self, backbone):
        self.backbone = backbone

    def plan(self, encoding, budgets_B):
        return random_plans(self.backbone, encoding, budgets_B, torch.Generator().manual_seed(0))


class Charging(Bare):
    """One with all that it may have."""

    name, budgeted, signals, notes = "charging", False, ("cls-0",), {"mine": 1}

    def controller_flops(self, encoding):
        return 30

    def planning_flops(self, encoding):
        return 10


def test_ones_own_planner_has_the_defaults_of_what_it_lacks(small, source, encoding):
    bare, bank = Bare(small), EncodingBank(small, source)
    planner = adopted(bare)
    assert (planner.budgeted, planner.signals, dict(planner.notes)) == (True, (), {})
    assert planner.controller_flops(encoding) == planner.planning_flops(encoding) == 0
    (record,) = evaluate(bare, small, bank, (0.6,), progress=False)
    (reference,) = evaluate(RandomPlanner(small), small, bank, (0.6,), progress=False)
    assert record == {**reference, "policy": "bare"}
    assert measure(small, bare, [[source[0]]], 0.8, 1, repeats=1, warm_up=0).prefill.p50 > 0
    assert len(Planned.of(bare, small, [source[0]], [0.6]).answer(1)) == 1
    plans = adopted(bare).plan(encoding, BUDGETS), LaidOutPlanner(bare, small, "renumbered").plan(encoding, BUDGETS)
    assert torch.equal(*(small.layout.flatten(plan) for plan in plans))


def test_wrappers_have_the_members_of_what_they_wrap(small, encoding):
    charging = Charging(small)
    timed = MillisecondPlanner(charging, small, LatencyModel("here", "test", (1.0,) * 5, 0.0), 3.0)
    chain = ChainPlanner(charging, charging, small)
    for planner in (PlannerWrapper(charging), LaidOutPlanner(charging, small, "original")):
        assert (planner.controller_flops(encoding), planner.planning_flops(encoding)) == (30, 10)
        assert (planner.budgeted, planner.signals, planner.notes) == (False, ("cls-0",), {"mine": 1})
    assert (chain.controller_flops(encoding), chain.planning_flops(encoding)) == (60, 20)
    assert timed.planning_flops(encoding) == 10 * TRIES == timed.controller_flops(encoding) - 20
    assert PlannerWrapper(PlannerWrapper(charging)).name == "charging"


@pytest.mark.parametrize("positions", [None, *POSITIONS])
@pytest.mark.parametrize("merge", [False, True])
@pytest.mark.parametrize("policy", ["learned", "random", "divprune", "stride@0.5"])
def test_every_token_method_can_be_laid_out_within_its_budget(small, encoding, policy, merge, positions):
    planner = learned(small) if policy == "learned" else load_planner(policy, small, 0)
    laid_out = LaidOutPlanner(planner, small, positions, merge)
    masks = laid_out.plan(encoding, BUDGETS + 0.2)
    cost = small.cost(encoding, masks, laid_out.controller_flops(encoding))
    if laid_out.budgeted:
        assert (cost.llm <= budget_flops(BUDGETS + 0.2, small.full_llm_flops(encoding))).all()
    merged = merge or positions == "restored"
    assert masks.survivors.merged.all() == merged
    own = "renumbered" if policy == "divprune" else "original"
    assert POSITIONS[int(masks.survivors.positions[0])] == (positions or own)
    with torch.no_grad():
        assert torch.isfinite(small.prefill(encoding, masks)[0]).all()


def test_a_layout_for_all_policies_leaves_those_alone_that_name_theirs():
    assert with_layout("divprune", True, "original") == "divprune@merge@original"
    assert with_layout("divprune@restored", True, None) == "divprune@restored"
    assert with_layout("full", True, "renumbered") == "full"
    assert with_layout("stride@0.5 then runs/rl", False, "renumbered") == "stride@0.5@renumbered then runs/rl"
    assert with_layout("rl", False, None) == "rl"


def test_shares_make_a_planner_each(small):
    planners = load_planners(["full", "stride", "prumerge", "divprune@merge"], small, 0, keep=(0.5, 0.25))
    found = [(planner.name, planner.notes.get("keep")) for planner in planners]
    assert found == [
        ("full", None),
        ("stride", 0.5),
        ("stride", 0.25),
        ("prumerge", None),
        ("divprune@merge", 0.5),
        ("divprune@merge", 0.25),
    ]
    chains = load_planners(["stride then random", "prumerge then random"], small, 0, keep=(0.5,))
    assert [chain.notes for chain in chains] == [{"keep": 0.5}, {}]
    with pytest.raises(InputError, match="policy 'random' does not choose visual tokens by count"):
        load_planners(["random"], small, 0, keep=(0.5,))


@pytest.mark.parametrize(("share", "count"), [(0.5, 8), (0.25, 4), (0.125, 2), (0.01, 1)])
def test_a_share_of_the_tokens(small, encoding, share, count):
    masks = load_planner(f"divprune@{share}", small, 0).plan(encoding, torch.ones(6))
    assert masks.tokens.sum(1).tolist() == [count] * 6
    staged = load_planner(f"fastv:k=1@{share}", small, 0).plan(encoding, torch.ones(6))
    assert small.visual_counts(staged)[0].tolist() == [16, count, count]


@pytest.mark.parametrize("policy", ["fastv:k=1", "prumerge:count=budget", "divprune@merge"])
def test_limits_in_milliseconds_hold_for_every_kind_of_rule(small, encoding, policy):
    model = LatencyModel("here", small.name, (0.05, 0.02, 1.0, 1000.0, 1000.0), 0.0)
    limit = 0.9 * float(model.predict(small, encoding, small.full(encoding)).min())
    masks, shares = MillisecondPlanner(load_planner(policy, small, 0), small, model, limit).choose(
        encoding, torch.ones(6)
    )
    predicted = model.predict(small, encoding, masks)
    assert (predicted <= limit).all() and float(predicted.mean()) > 0.8 * limit and (shares < 1).all()


def test_plans_of_several_kinds_share_a_batch(small, encoding):
    """What a service would do: each row by another rule."""
    policies = ["full", "fastv:k=1", "prumerge", "divprune@merge", "stride@0.5@restored", "random-layers"]
    plans = [load_planner(policy, small, 0).plan(encoding, BUDGETS + 0.3) for policy in policies]
    mixed = Masks.cat([plan[row : row + 1] for row, plan in enumerate(plans)])
    with torch.no_grad():
        together, _ = small.prefill(encoding, mixed)
        for row, plan in enumerate(plans):
            alone, _ = small.prefill(encoding, plan)
            assert torch.allclose(together[row], alone[row], atol=1e-4)
    assert small.cost(encoding, mixed).llm.tolist() == [
        int(small.cost(encoding, plan).llm[row]) for row, plan in enumerate(plans)
    ]
