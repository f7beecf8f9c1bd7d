"""AdaLLaVA's scheduler: exactly as much as the budget pays for, decided inside the decoder from what the prompt is."""

from dataclasses import replace

import pytest
import torch

from maskgym.backbones import EncodingBank
from maskgym.backbones.plans.masks import Masks
from maskgym.backbones.soft_decoder import Gates, SoftMidway, soft_answer_logits
from maskgym.common.errors import InputError
from maskgym.policies.adallava.scheduler import AdaLlavaConfig, AdaLlavaPlanner, AdaLlavaScheduler, exactly
from maskgym.policies.adallava.training import AdaLlavaLearner, _with_token
from maskgym.policies.planning.projection import budget_flops
from maskgym.policies.relaxation.training import RelaxationSettings, RelaxedBatch, answer_targets
from maskgym.policies.wrappers.chain import ChainPlanner
from tests.conftest import build, random_masks
from tests.test_cost import counted

ROWS = [0, 1, 2, 3, 6, 7]


def scheduler_of(backbone, variant="l", prefix=1, **options):
    torch.manual_seed(1)
    layout = backbone.layout
    config = AdaLlavaConfig(layout.layers, layout.heads, backbone.hidden, prefix, variant, **options)
    scheduler = AdaLlavaScheduler(config)
    torch.nn.init.normal_(scheduler.scheduler.weight)
    return scheduler


def planner_for(backbone, variant="l", **options):
    return AdaLlavaPlanner(scheduler_of(backbone, variant, **options), backbone, f"adallava-{variant}")


@pytest.mark.parametrize("group", [1, 2])
@pytest.mark.parametrize("noise", [True, False])
def test_exactly_as_many_units_are_kept(group, noise):
    torch.manual_seed(0)
    logits = torch.randn(7, 3, 4, requires_grad=True)
    units = torch.tensor([0, 1, 2, 3, 4, 5, 12 // group])
    kept = exactly(logits, units, group, 5.0, noise)
    assert set(kept.unique().tolist()) <= {0.0, 1.0}
    assert torch.equal(kept.sum((1, 2)).long(), units * group)
    assert (kept.sum(2).long() % group == 0).all(), "a unit lies in one layer"
    (kept * torch.randn_like(kept)).sum().backward()
    moved = logits.grad.abs().sum((1, 2)) > 0
    assert moved[1:6].all() and not moved[0]


def test_without_noise_the_best_are_kept():
    torch.manual_seed(0)
    logits = torch.randn(5, 4, 3)
    units = torch.tensor([1, 3, 5, 7, 11])
    kept = exactly(logits, units, 1, 5.0, noise=False).flatten(1)
    for row, count in enumerate(units.tolist()):
        assert set(kept[row].nonzero()[:, 0].tolist()) == set(logits[row].flatten().topk(count).indices.tolist())


@pytest.mark.parametrize("variant", ["l", "h"])
def test_a_batch_is_its_rows_and_the_budget_is_met(backbone, bank, variant):
    encoding = bank.gather(ROWS)
    planner = planner_for(backbone, variant)
    budgets = torch.tensor([0.55, 0.65, 0.7, 0.8, 0.9, 1.0], dtype=torch.float64)
    masks = planner.plan(encoding, budgets)
    answers = backbone.answer(encoding, masks)
    spent = backbone.cost(encoding, answers.masks, planner.controller_flops(encoding)).llm
    promised = backbone.cost(encoding, masks, planner.controller_flops(encoding)).llm
    assert (spent <= promised).all()
    assert (promised <= budget_flops(budgets, backbone.full_llm_flops(encoding))).all()
    assert torch.equal(answers.masks.effective_heads[:, 1:].sum((1, 2)), masks.effective_heads[:, 1:].sum((1, 2)))
    with torch.no_grad():
        together, _ = backbone.prefill(encoding, masks)
        for row in range(len(ROWS)):
            part = torch.tensor([row])
            alone, _ = backbone.prefill(encoding.rows(part), masks[row : row + 1])
            assert torch.allclose(alone[0], together[row], atol=1e-4)


@pytest.mark.parametrize("variant", ["l", "h"])
def test_the_price_is_what_is_computed(small, source, variant):
    planner = planner_for(small, variant)
    encoding = EncodingBank(small, source).gather([2])
    masks = planner.plan(encoding, torch.tensor([0.75], dtype=torch.float64))
    executed = small.answer(encoding, masks).masks
    token = counted(lambda: planner.scheduler.token(torch.tensor([1])))
    choice = counted(lambda: planner.scheduler.scheduler(torch.zeros(1, small.hidden)))
    assert token + choice == planner.scheduler.flops()
    price = small.cost(encoding, executed, planner.controller_flops(encoding))
    assert counted(lambda: small.prefill(encoding, masks)) == int(price.llm)


@pytest.mark.parametrize("kind", ["mha", "gqa", "heads-only"])
@pytest.mark.parametrize("variant", ["l", "h"])
def test_relaxed_and_executed_plans_answer_alike(source, kind, variant):
    """Of answers of several tokens, so that decoding after the extra token is checked too."""
    options = {"gqa": {"heads": 8, "kv_heads": 4}, "heads-only": {"width": "heads"}, "mha": {}}[kind]
    backbone = build(**options)
    planner = planner_for(backbone, variant)
    bank = EncodingBank(backbone, source)
    prompts, answers = bank.gather(ROWS), ["red green blue", "yes", "no no", "red", "circle yes", "green"]
    ids = [backbone.answer_ids(answer) for answer in answers]
    batch = RelaxedBatch(prompts, bank.gather(ROWS, [[3, *own] for own in ids]), ids, torch.full((6,), 0.75))
    units = planner.units(prompts, batch.budgets_B)
    assert (units > 0).all()
    with torch.no_grad():
        everything = Gates.of(backbone.full(prompts))

        def choose(state):
            drawn = planner.scheduler.draw(state, units)
            return Gates(everything.tokens, drawn.heads, drawn.layers)

        answered = _with_token(batch, planner.scheduler.token(units))
        logits = soft_answer_logits(backbone, answered, everything, ids, SoftMidway(1, choose))
        found = logits.log_softmax(-1).gather(1, answer_targets(backbone, ids)[:, None])[:, 0]
    ends = torch.tensor([len(own) + 1 for own in ids]).cumsum(0) - 1
    rows = torch.arange(6).repeat_interleave(torch.tensor([len(own) + 1 for own in ids]))
    found[ends] = 0  # the executed score leaves the end token out
    expected = backbone.answer(prompts, planner.plan_units(prompts, units), references=answers).log_likelihood
    assert torch.allclose(torch.zeros(6).index_add(0, rows, found), expected, atol=1e-4)


def test_queries_differ_in_what_is_kept_and_budgets_in_how_much(small, source):
    encoding = EncodingBank(small, source).gather([0, 1, 2, 3, 6, 7])
    planner = planner_for(small, "h")
    kept = small.answer(encoding, planner.plan_units(encoding, torch.full((6,), 3))).masks
    assert len(kept.heads.flatten(1).unique(dim=0)) > 1
    budgets = torch.linspace(0.5, 1, 6, dtype=torch.float64)
    units = planner.units(encoding, budgets)
    assert (units.diff() >= 0).all() and units[0] < units[-1]


def test_the_original_counts_layers_whatever_they_cost(small, source):
    encoding = EncodingBank(small, source).gather([0, 1, 2])
    planner = planner_for(small, levels="layers")
    units = planner.units(encoding, torch.tensor([0.1, 0.67, 1.0], dtype=torch.float64))
    assert units.tolist() == [0, 1, 2]


@pytest.mark.parametrize("tokens", ["stride@0.5", "fastv:k=1,r=0.5", "fastv:k=2,r=0.5"])
@pytest.mark.parametrize("variant", ["l", "h"])
def test_a_token_step_may_come_first(small, source, tokens, variant):
    """With k=2 attention is asked of a layer that the scheduler may have skipped."""
    from maskgym.eval.policies import load_planner

    encoding = EncodingBank(small, source).gather(ROWS)
    first = load_planner(tokens, small, 0)
    chain = ChainPlanner(first, planner_for(small, variant), small)
    budgets = torch.full((6,), 0.65, dtype=torch.float64)
    masks = chain.plan(encoding, budgets)
    answers = small.answer(encoding, masks)
    spent = small.cost(encoding, answers.masks, chain.controller_flops(encoding)).llm
    assert (spent <= budget_flops(budgets, small.full_llm_flops(encoding))).all()
    assert (small.visual_counts(answers.masks)[:, -1] < encoding.visual_valid_BN.sum(1)).all()
    for row in range(6):
        part = torch.tensor([row])
        alone = small.answer(encoding.rows(part), masks[row : row + 1]).masks
        assert torch.equal(alone.heads[0], answers.masks.heads[row])


def test_the_loss_reaches_token_and_scheduler_and_nothing_else(small, source):
    bank = EncodingBank(small, source)
    planner = planner_for(small, "h")
    learner = AdaLlavaLearner(planner, RelaxationSettings("adallava-h", (5.0, 5.0)))
    ids = [small.answer_ids(word) for word in ("red", "yes", "no", "blue")]
    batch = RelaxedBatch(bank.gather(range(4)), bank.gather(range(4), [[3, *own] for own in ids]), ids, torch.ones(4))
    batch = replace(batch, budgets_B=torch.full((4,), 0.7))
    learner.losses(batch, 0.0)["answer"].backward()
    assert all(float(p.grad.abs().sum()) > 0 for p in planner.scheduler.parameters())
    assert all(p.grad is None for p in small.model.parameters())


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda b: scheduler_of(b, prefix=3), "3 prefix layers do not fit a backbone of 3 layers; give 1 to 2"),
        (lambda b: scheduler_of(b, prefix=0), "0 prefix layers do not fit"),
        (lambda b: scheduler_of(b, "x"), "AdaLLaVA's variant is 'x'"),
        (lambda b: scheduler_of(b, "h", group=3), "groups of 3 heads do not fit 4 head slots"),
        (lambda b: scheduler_of(b, levels="heads"), "AdaLLaVA's levels are 'heads'"),
    ],
)
def test_sizes_that_do_not_fit_are_named(small, make, words):
    with pytest.raises(InputError, match=words):
        make(small)


def test_what_cannot_be_is_named(small, source):
    encoding = EncodingBank(small, source).gather([0, 1])
    planner = planner_for(small, prefix=2)
    with pytest.raises(InputError, match=r"budget 0.5 is below what the 2 prefix layers of adallava-l cost, 0\.[67]"):
        planner.plan(encoding, torch.tensor([0.9, 0.5], dtype=torch.float64))
    with pytest.raises(InputError, match="layer 1 is protected, but AdaLLaVA decides on all from layer 1 on"):
        planner_for(build(protected_layers=(0, 1)))
    plans = planner.plan(encoding, torch.ones(2))
    with pytest.raises(InputError, match="share a batch only with plans of their kind"):
        Masks.cat([plans, random_masks(small, 2)])
    with pytest.raises(InputError, match="a decision stands before layer 9"):
        small.prefill(encoding, replace(plans, midway=replace(plans.midway, layer=9)))
    assert len(Masks.cat([plans, plans[:1]]).midway.units_B) == 3
