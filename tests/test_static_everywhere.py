"""Every published rule on every family: alone as in a batch, within its budget, charged to the last FLOP."""

from dataclasses import replace
from itertools import pairwise

import pytest
import torch

from maskgym.backbones import EncodingBank, InputError
from maskgym.eval.policies import load_planner
from maskgym.policies.baselines import BASELINES
from maskgym.policies.planning.projection import budget_flops
from maskgym.policies.static import STATIC, TOWER_RULES
from tests.conftest import build, build_of, slow_but
from tests.families import BUILDERS
from tests.test_cost import counted

ROWS = [0, 1, 2, 4, 6, 7]
FIXED = [
    "fastv:k=1,r=0.6",
    "pyramiddrop:ratio=0.5",
    "prumerge:count=budget",
    "prumerge+@mean-attention:count=budget,neighbours=3",
    "cdpruner:relevance=unlike",
    "restore:base=stride",
    "divprune@merge@original",
    "stride@restored",
    "divprune@0.5@renumbered",
    "pyramiddrop@0.9",
    "prumerge+@mean-attention then random-layers",
    "fastv:k=2,r=0.5 then random-heads",
    "stride@0.5@restored then random",
]
POLICIES = [*(name for name in STATIC if name != "static"), *FIXED]
DRAWN = ("random", "then")


def inside(policy):
    return policy.startswith(("fastv", "pyramiddrop", "sparsevlm"))


def planned(policy, backbone):
    """The planner, or None where it needs what the tower lacks."""
    try:
        return load_planner(policy, backbone, 0)
    except InputError as error:
        assert "class token" in str(error) and backbone.family.signals == ("mean-last", "mean-features")
        return None


@pytest.fixture(scope="module", params=slow_but(("embedded",), [*BUILDERS, "embedded"]))
def place(request, source):
    backbone = build() if request.param == "embedded" else build_of(request.param)
    return backbone, EncodingBank(backbone, source)


@pytest.mark.parametrize("policy", POLICIES)
def test_alone_as_in_a_batch_within_the_budget_and_charged(place, policy):
    backbone, bank = place
    planner = planned(policy, backbone)
    if planner is None:
        return
    encoding = bank.gather(ROWS)
    budgets = torch.tensor([0.86, 0.87, 0.88, 0.9, 0.95, 0.98], dtype=torch.float64)
    if inside(policy):  # two of three layers run in full
        budgets = 0.9 + budgets / 10
    masks = planner.plan(encoding, budgets)
    cost = backbone.cost(encoding, masks, planner.controller_flops(encoding))
    full = backbone.full_llm_flops(encoding)
    if planner.budgeted:
        assert (cost.llm <= budget_flops(budgets, full)).all()
        assert "then" in policy or float((cost.llm / full / budgets).mean()) > 0.8, "the budget is not used"
    with torch.no_grad():
        together, _ = backbone.prefill(encoding, masks)
    for row, number in enumerate(ROWS):
        one = bank.gather([number])
        own = masks[row : row + 1]
        if not any(word in policy for word in DRAWN):
            own = planner.plan(one, budgets[row : row + 1])
            assert torch.equal(own.tokens, masks.tokens[row : row + 1])
            assert int(backbone.cost(one, own, planner.controller_flops(one)).llm) == int(cost.llm[row])
        with torch.no_grad():
            alone, _ = backbone.prefill(one, own)
        assert torch.allclose(together[row], alone[0], atol=2e-4, rtol=0)


@pytest.mark.parametrize("policy", [policy for policy in POLICIES if "then" not in policy])
def test_what_choosing_costs_is_the_counted_figure(place, policy):
    backbone, bank = place
    planner = planned(policy, backbone)
    if planner is None:
        return
    encoding = bank.gather([4])
    budget = torch.tensor([0.96 if inside(policy) else 0.86], dtype=torch.float64)
    heard = sum(int(encoding.saliency[signal].flops) for signal in planner.signals)
    masks = planner.plan(encoding, budget)
    flops = counted(lambda: backbone.prefill(encoding, planner.plan(encoding, budget)))
    assert flops + heard == int(backbone.cost(encoding, masks).llm)


@pytest.mark.parametrize("policy", [*(name for name in STATIC if name != "static"), "random", "random-layers"])
def test_budget_one_is_the_full_plan_and_more_budget_is_more_tokens(small, source, policy):
    planner = load_planner(policy, small, 0)
    encoding = EncodingBank(small, source).gather([0, 2, 4])
    full = small.full_llm_flops(encoding)
    if not planner.budgeted:
        return
    everything = planner.plan(encoding, torch.ones(3, dtype=torch.float64))
    assert torch.equal(small.cost(encoding, everything).llm, full)
    with torch.no_grad():
        expected, _ = small.prefill(encoding, small.full(encoding))
        assert torch.allclose(small.prefill(encoding, everything)[0], expected, atol=1e-5)
    counts = [
        small.visual_counts(planner.plan(encoding, torch.full((3,), share, dtype=torch.float64))).sum(1)
        for share in (0.84, 0.88, 0.94, 1.0)
    ]
    assert all((less <= more).all() for less, more in pairwise(counts)) or policy.startswith("random")


def test_the_registry_is_whole():
    plain, published = (
        "full random stride static",
        "prumerge prumerge+ fastv fastv-mean visionzip sparsevlm pyramiddrop",
    )
    assert {*plain.split(), *published.split(), "divprune", "cdpruner"} <= set(BASELINES)
    assert {f"{name}@mean-attention" for name in TOWER_RULES} <= set(BASELINES)


@pytest.mark.parametrize("policy", ["prumerge", "prumerge+", "visionzip"])
def test_a_tower_without_a_class_token_is_named_with_the_substitute(policy):
    backbone = build_of("qwen2_5_vl")
    with pytest.raises(
        InputError, match="needs a class token, which the vision tower of 'qwen2_5_vl' has not"
    ) as caught:
        load_planner(policy, backbone, 0)
    assert str(caught.value).endswith(f"use '{policy}@mean-attention'")
    assert load_planner(f"{policy}@mean-attention", backbone, 0).name == f"{policy}@mean-attention"


def test_an_encoding_made_too_early_is_named(source):
    backbone = build_of("llava")
    encoding = backbone.encode([source[0]])
    planner = load_planner("visionzip", backbone, 0)
    with pytest.raises(
        InputError, match=r"policy 'visionzip' needs the class token's attention .* make the policy first"
    ):
        planner.plan(encoding, torch.tensor([0.5]))
    assert len(planner.plan(backbone.encode([source[0]]), torch.tensor([0.5]))) == 1


@pytest.mark.parametrize("policy", ["fastv:k=2", "stride", "divprune@merge"])
def test_a_budget_that_cannot_be_met_is_refused_with_the_least_that_can(small, source, policy):
    encoding = EncodingBank(small, source).gather([0])
    planner = load_planner(policy, small, 0)
    with pytest.raises(InputError, match="the least budget here is") as caught:
        planner.plan(encoding, torch.tensor([0.1], dtype=torch.float64))
    message = str(caught.value)
    assert ("its first 2 layers run on all visual tokens" in message) == (policy == "fastv:k=2")
    least = float(message.rsplit(" ", 1)[1])
    masks = planner.plan(encoding, torch.tensor([least + 2e-2], dtype=torch.float64))
    assert int(small.visual_counts(masks)[0, -1]) >= 1
    if "@" not in policy:
        with pytest.raises(InputError, match="the least budget"):
            planner.plan(encoding, torch.tensor([least - 1e-3], dtype=torch.float64))


BAD = [
    ("fastv:k=3", "fastv: k is 3; it must be from 1 to 2"),
    ("fastv:k=0", "fastv: k is 0; it must be from 1 to 2"),
    ("fastv-mean:k=9", "fastv-mean: k is 9"),
    ("fastv:r=1", r"fastv: r is 1; it must be a share of the visual tokens in \[0, 1\)"),
    ("fastv:r=-0.5", "fastv: r is -0.5"),
    ("fastv:k=2.5", "policy 'fastv' has no option 'k=2.5'; its options are whole numbers for k; numbers for r"),
    ("fastv:mean=true", "policy 'fastv' has no option 'mean=true'"),
    ("stride:k=2", "policy 'stride' has no option 'k=2'; it has no options"),
    ("pyramiddrop:ratio=0", "pyramiddrop: ratio is 0"),
    ("pyramiddrop:layers=2-1", "pyramiddrop: tokens cannot be dropped on entering layers 2, 1; give rising numbers"),
    ("pyramiddrop:layers=1-5", "from 1 to 2: attention of the layers before must be there"),
    ("sparsevlm:layers=1-2,shape=0.5-0.2", "sparsevlm: shape is 0.5-0.2; it must be one share of the first count"),
    ("prumerge:count=some", "has no option 'count=some'; its options are one of image, budget for count"),
    ("visionzip:contextual=1", "visionzip: contextual is 1; it must be a share of the kept tokens"),
    ("divprune@1.5", r"a share of 1.5 of the visual tokens is outside \(0, 1\]"),
    ("random@0.5", "policy 'random' does not choose visual tokens by count"),
    ("prumerge@0.5", "policy 'prumerge' does not choose visual tokens by count"),
    ("divprune@restored@original", "asks for positions restored and original; give one of them"),
    (
        "divprune then random",
        "the first part of a chain must set its own number of tokens, but policy 'divprune' follows",
    ),
    ("nobody@merge", "unknown policy 'nobody'"),
    ("no.such.module:planner", r"policy 'no.such.module:planner' cannot be imported \(ModuleNotFoundError"),
    ("tests.test_static_everywhere:BAD", "is a list; it must be a function or class of backbone and seed"),
]


@pytest.mark.parametrize(("policy", "words"), BAD)
def test_what_cannot_be_is_named(small, policy, words):
    with pytest.raises(InputError, match=words):
        load_planner(policy, small, 0)


@pytest.mark.parametrize(
    ("policy", "words"),
    [
        ("fastv@merge", "policy 'fastv' drops visual tokens inside the decoder; .* leave out --merge"),
        ("sparsevlm@renumbered", "leave out --positions renumbered"),
        ("visionzip@merge", "policy 'visionzip' merges tokens by a rule of its own; leave out --merge"),
        (
            "pyramiddrop@0.2",
            "averaged over layers, is below what policy 'pyramiddrop' can meet: its first layer runs on all",
        ),
        ("prumerge then fastv then random", "must set its own number of tokens, but policy 'fastv'"),
    ],
)
def test_what_cannot_be_together_is_named(small, source, policy, words):
    with pytest.raises(InputError, match=words):
        planner = load_planner(policy, small, 0)
        planner.plan(EncodingBank(small, source).gather([0]), torch.tensor([0.8], dtype=torch.float64))


class Corner:
    """A planner of a user's own: the first tokens, ``n`` of them."""

    budgeted = False

    def __init__(self, backbone, seed, n: int = 3):
        self.backbone, self.n, self.name = backbone, n, "corner"

    def plan(self, encoding, budgets_B):
        masks = self.backbone.full(encoding)
        tokens = masks.tokens.clone()
        tokens[:, self.n :] = False
        return replace(masks, tokens=tokens)

    def controller_flops(self, encoding):
        return 0


def test_ones_own_planner_by_dotted_path(small, source):
    encoding = EncodingBank(small, source).gather([0])
    for policy, kept in (("tests.test_static_everywhere:Corner", 3), ("tests.test_static_everywhere:Corner:n=5", 5)):
        masks = load_planner(policy, small, 0).plan(encoding, torch.ones(1))
        assert int(masks.tokens.sum()) == kept
    laid_out = load_planner("tests.test_static_everywhere:Corner:n=5@merge@renumbered", small, 0)
    assert laid_out.name == "corner@merge@renumbered" and laid_out.plan(encoding, torch.ones(1)).survivors.merged.all()
