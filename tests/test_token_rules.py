"""What each published rule selects, computed by hand or by brute force on small examples."""

from dataclasses import replace
from itertools import combinations, pairwise

import pytest
import torch

from maskgym.backbones import EncodingBank
from maskgym.backbones.encodings.saliency import Saliency
from maskgym.backbones.engine.arrange import arrange
from maskgym.backbones.plans.cost import DecoderShape
from maskgym.backbones.plans.masks import MaskLayout
from maskgym.backbones.plans.published_cost import fastv_layer_macs
from maskgym.backbones.plans.stages import Stage, token_counts
from maskgym.eval.policies import load_planner
from maskgym.policies.static.diversity import CDPrunerPlanner, DivPrunePlanner
from maskgym.policies.static.inside import FastVPlanner
from maskgym.policies.static.plain import evenly_spaced
from maskgym.policies.static.progressive import PyramidDropPlanner, SparseVLMPlanner
from maskgym.policies.static.prumerge import PruMergePlanner
from maskgym.policies.static.restore import RestorePlanner, distinctness
from maskgym.policies.static.visionzip import VisionZipPlanner
from tests.conftest import build, build_of
from tests.masked_reference import masked_logits

ONE = torch.ones(1, dtype=torch.float64)


@pytest.fixture(scope="module")
def llava():
    """LLaVA with 16 visual tokens, whose projector takes tokens one by one."""
    return build_of("llava")


def told(backbone, source, signal, received, keys=None, rows=1):
    """An encoding whose tower says what the test wants; its features are real."""
    backbone.listen([signal])
    encoding = EncodingBank(backbone, source).gather([0] * rows)
    real = encoding.saliency[signal]
    received = torch.tensor(received).reshape(rows, -1)
    keys = real.keys if keys is None else keys
    return replace(encoding, saliency={signal: Saliency(received, keys, real.features, real.flops)})


def angles(degrees):
    """Unit vectors in a plane, (1, n, 4)."""
    turned = torch.tensor(degrees) * torch.pi / 180
    return torch.stack([turned.cos(), turned.sin(), 0 * turned, 0 * turned], dim=1)[None]


def test_stride_by_hand():
    valid = torch.tensor([[True] * 8, [True] * 8, [True] * 6 + [False] * 2])
    chosen = evenly_spaced(valid, torch.tensor([2, 3, 2]))
    assert [row.nonzero()[:, 0].tolist() for row in chosen] == [[2, 6], [1, 4, 6], [1, 4]]


LOUD = [0.01] * 16
LOUD[3], LOUD[9], LOUD[12] = 0.5, 0.7, 0.02


def test_prumerge_keeps_the_outliers_image_by_image(llava, source):
    """Quartiles of the first row are all 0.01, so 0.02 is an outlier too; the second row has none above its fence."""
    spread = [0.1 + 0.01 * number for number in range(16)]
    encoding = told(llava, source, "cls-last", [LOUD, spread], rows=2)
    planner = PruMergePlanner(llava, neighbours=2)
    kept, order = planner._outliers(encoding)
    assert kept[0].nonzero()[:, 0].tolist() == [3, 9, 12] and kept[1].nonzero()[:, 0].tolist() == [15]
    assert order[0, [9, 3, 12]].argsort().tolist() == [0, 1, 2]
    masks = planner.plan(encoding, ONE.expand(2))
    assert masks.tokens.sum(1).tolist() == [4, 2], "the summary is one more token"
    assert masks.tokens[0, 15] and masks.tokens[1, 14], "it takes the slot of the last dropped token"


def test_prumerge_merges_weighs_and_orders_as_published(llava, source):
    degrees = [0, 5, 60, 62, 65, 120, 121, 125, 180, 182, 184, 186, 240, 243, 300, 305]
    keys = angles(degrees)
    encoding = told(llava, source, "cls-last", LOUD, keys)
    masks = PruMergePlanner(llava, neighbours=2).plan(encoding, ONE)
    x, a = encoding.saliency["cls-last"].features[0], torch.tensor(LOUD)
    expected = {
        3: x[3] + a[2] * x[2] + a[4] * x[4],
        9: x[9] + a[8] * x[8] + a[10] * x[10],
        12: x[12] + a[13] * x[13] + a[11] * x[11],
        15: sum(a[number] * x[number] for number in range(16) if number not in (3, 9, 12)),
    }
    with torch.no_grad():
        for number, features in expected.items():
            got = masks.survivors.tokens[0, number]
            assert torch.allclose(got, llava.family.project(features), atol=1e-5)
    laid_out = arrange(encoding, masks).encoding
    places = laid_out.visual_rope_BNR[0, [9, 3, 12, 15], 0]
    assert (places - places[0]).tolist() == [0, 1, 2, 3], "by falling attention, the summary last"
    assert torch.allclose(laid_out.visual_BND[0, 9], masks.survivors.tokens[0, 9])


def test_prumerge_plus_adds_the_grid(llava, source):
    encoding = told(llava, source, "cls-last", LOUD)
    planner = PruMergePlanner(llava, plus=True)
    kept, order = planner._outliers(encoding)
    step = int(16 / 3)  # three outliers of 16
    grid = set(range(0, 15, int(step / 3)))
    assert kept[0].nonzero()[:, 0].tolist() == sorted({3, 9, 12} | grid)
    few = told(llava, source, "cls-last", [0.01] * 9 + [0.9] + [0.01] * 6)
    kept, order = planner._outliers(few)
    assert kept[0].nonzero()[:, 0].tolist() == [0, 5, 9, 10]  # int(16 / 3) = 5; the last place is not asked
    ranked = order[0].masked_fill(~kept[0], torch.inf).argsort()[:4].tolist()
    assert ranked == [9, 0, 5, 10]


@pytest.mark.parametrize(("plus", "kept"), [(False, [3, 9, 12]), (True, [3, 9])])
def test_prumerge_with_a_fixed_count(llava, source, plus, kept):
    encoding = told(llava, source, "cls-last", LOUD)
    planner = PruMergePlanner(llava, count="budget", plus=plus)
    masks = planner.plan_counts(encoding, torch.tensor([4]))
    assert int(masks.tokens.sum()) == 4 and set(kept) <= set(masks.tokens[0].nonzero()[:, 0].tolist())
    assert planner.plan_counts(encoding, torch.tensor([16])).tokens.all()
    single = planner.plan_counts(encoding, torch.tensor([1]))
    assert single.tokens[0].nonzero()[:, 0].tolist() == [9], "a single token leaves no room for the summary"


def test_without_features_visual_tokens_are_merged(source):
    backbone = build_of("idefics3")
    planner = PruMergePlanner(backbone, cls=False, neighbours=1)
    encoding = EncodingBank(backbone, source).gather([6])
    masks = planner.plan(encoding, ONE)
    saliency, x = encoding.saliency["mean-last"], encoding.visual_BND[0]
    kept = planner._outliers(encoding)[0][0]
    unit = torch.nn.functional.normalize(saliency.keys[0], dim=-1)
    valid = encoding.visual_valid_BN[0]
    for number in kept.nonzero()[:, 0].tolist():
        alike = (unit @ unit[number]).masked_fill(~valid, -torch.inf)
        alike[number] = -torch.inf
        near = int(alike.argmax())
        assert torch.allclose(
            masks.survivors.tokens[0, number], x[number] + saliency.received[0, near] * x[near], atol=1e-5
        )


def test_visionzip_by_hand(llava, source):
    received = [0.0] * 16
    received[2], received[5], received[11] = 0.9, 0.8, 0.7
    degrees = [0, 10, 0, 20, 30, 0, 90, 100, 110, 115, 120, 0, 200, 210, 220, 300]
    encoding = told(llava, source, "cls-features", received, angles(degrees))
    planner = VisionZipPlanner(llava, contextual=0.4)
    masks = planner.plan_counts(encoding, torch.tensor([5]))
    # Dominant: 2, 5, 11. Of the 13 others every 6th: 0 and 7 (0 1 3 4 6 | 7: the 7th of 0 1 3 4 6 7 8 ...).
    rest = [number for number in range(16) if number not in (2, 5, 11)]
    targets = [rest[0], rest[6]]
    assert masks.tokens[0].nonzero()[:, 0].tolist() == sorted([2, 5, 11, *targets])
    x, groups = encoding.saliency["cls-features"].features[0], {target: [target] for target in targets}
    for number in rest:
        if number not in targets:
            gap = {t: abs((degrees[number] - degrees[t] + 180) % 360 - 180) for t in targets}
            groups[min(gap, key=gap.get)].append(number)
    assert all(len(group) > 1 for group in groups.values())
    with torch.no_grad():
        for target, group in groups.items():
            expected = llava.family.project(x[group].mean(0))
            assert torch.allclose(masks.survivors.tokens[0, target], expected, atol=1e-5)
    assert torch.equal(masks.survivors.tokens[0, 5], encoding.visual_BND[0, 5])
    order = arrange(encoding, masks).encoding.visual_rope_BNR[0, [2, 5, 11, *targets], 0]
    assert (order - order[0]).tolist() == [0, 1, 2, 3, 4], "dominant first, then contextual"


def shown(small, source, visual):
    encoding = EncodingBank(small, source).gather([0])
    wide = torch.zeros(1, 16, 32)
    wide[..., : visual.shape[2]] = visual
    return replace(encoding, visual_BND=wide)


def test_divprune_is_greedy_max_min(small, source):
    torch.manual_seed(0)
    encoding = shown(small, source, torch.randn(1, 16, 5))
    x = torch.nn.functional.normalize(encoding.visual_BND[0], dim=-1)
    distance = 1 - x @ x.T
    others = distance + torch.eye(16) * 9
    chosen = [int(others.min(1).values.argmax())]
    while len(chosen) < 6:
        chosen.append(int(distance[chosen].min(0).values.argmax()))
    ranks = DivPrunePlanner(small).ranks(encoding, 6)[0]
    assert ranks.argsort()[:6].tolist() == chosen


def test_divprune_on_a_line(small, source):
    """Two clusters, 0 to 7 degrees and 90 to 97 degrees, and one token at 180: the three corners come first."""
    encoding = shown(small, source, angles([0, 1, 2, 3, 4, 5, 6, 7, 90, 91, 92, 93, 94, 95, 97, 180]))
    masks = DivPrunePlanner(small).plan_counts(encoding, torch.tensor([3]))
    assert masks.tokens[0, 15] and masks.tokens[0, 0] and masks.tokens[0, 8:15].sum() == 1


@pytest.mark.parametrize("relevance", ["alike", "unlike"])
def test_cdpruner_takes_the_largest_determinants(small, source, relevance):
    torch.manual_seed(1)
    encoding = shown(small, source, torch.randn(1, 16, 12))
    planner = CDPrunerPlanner(small, relevance=relevance)
    weight = planner.relevance(encoding)[0]
    words = torch.nn.functional.normalize(encoding.text_BTD[0], dim=-1)
    x = torch.nn.functional.normalize(encoding.visual_BND[0], dim=-1)
    scores = (x @ words.T).mean(1) * (1 if relevance == "alike" else -1)
    assert torch.allclose(weight, (scores - scores.min()) / (scores.max() - scores.min()), atol=1e-5)
    kernel = weight[:, None] * (x @ x.T) * weight
    chosen: list[int] = []
    while len(chosen) < 5:
        gains = {n: float(kernel[[*chosen, n]][:, [*chosen, n]].det()) for n in range(16) if n not in chosen}
        chosen.append(max(gains, key=gains.get))
    assert planner.ranks(encoding, 5)[0].argsort()[:5].tolist() == chosen
    best = max(combinations(range(16), 2), key=lambda pair: float(kernel[list(pair)][:, list(pair)].det()))
    assert len(set(best) & set(chosen[:2])) >= 1


def test_restore_keeps_half_and_merges_the_rest_into_anchors(small, source):
    torch.manual_seed(2)
    encoding = shown(small, source, torch.randn(1, 16, 6))
    masks = RestorePlanner(small).plan_counts(encoding, torch.tensor([6]))
    pure = DivPrunePlanner(small).plan_counts(encoding, torch.tensor([3])).tokens[0]
    rest = ~pure
    x = torch.nn.functional.normalize(encoding.visual_BND[0], dim=-1)
    alike = x @ x.T
    density = alike[:, rest].sum(1)
    score = torch.full((16,), -torch.inf)
    for number in rest.nonzero()[:, 0].tolist():
        denser = [other for other in rest.nonzero()[:, 0].tolist() if density[other] > density[number]]
        nearest = max((float(alike[number, other]) for other in denser), default=0.0)
        score[number] = density[number] * (1 - nearest)
    anchors = set(score.topk(3).indices.tolist())
    assert set(masks.survivors.targets[0].nonzero()[:, 0].tolist()) == anchors
    assert set(masks.tokens[0].nonzero()[:, 0].tolist()) == anchors | set(pure.nonzero()[:, 0].tolist())
    arranged = arrange(encoding, masks)
    assert arranged.sizes_BN[0, pure].tolist() == [1, 1, 1]
    assert float(arranged.sizes_BN[0, sorted(anchors)].sum()) == 13
    assert torch.allclose(distinctness(encoding.visual_BND, rest[None])[0, rest], score[rest], atol=1e-5)


@pytest.mark.parametrize("policy", ["fastv:k=1,r=0.6", "fastv-mean:k=2,r=0.8", "pyramiddrop:ratio=0.4"])
def test_rules_inside_take_the_attention_that_the_model_pays(small, source, policy):
    encoding = EncodingBank(small, source).gather([3])
    masks = load_planner(policy, small, 0).plan(encoding, ONE)
    with torch.no_grad():
        logits, _ = small.prefill(encoding, masks)
        assert torch.allclose(logits[0], masked_logits(small, encoding, masks, 0), atol=1e-5)


def test_fastv_keeps_what_the_last_token_attends_to(small, source):
    """From the attention weights of Hugging Face's own decoder."""
    encoding = EncodingBank(small, source).gather([3])
    x = small.pack(encoding, small.full(encoding)).x_PD
    language_model = small.model.model.language_model
    language_model.set_attn_implementation("eager")
    try:
        with torch.no_grad():
            attentions = language_model(inputs_embeds=x[None], output_attentions=True, use_cache=False).attentions
    finally:
        language_model.set_attn_implementation("sdpa")
    start = int(encoding.visual_places_BN[0, 0])
    for k in (1, 2):
        row = attentions[k - 1][0].mean(0)[-1, start : start + 16]
        best = sorted(row.topk(6).indices.tolist())
        masks = FastVPlanner(small, k=k, r=0.625).plan(encoding, ONE)
        assert masks.stages[0].layer == k and masks.stages[0].keep.tolist() == [6]
        tokens = torch.zeros(1, 16, dtype=torch.bool)
        tokens[0, best] = True
        given = replace(masks, stages=(Stage.given(k, tokens),))
        with torch.no_grad():
            assert torch.allclose(small.prefill(encoding, masks)[0], small.prefill(encoding, given)[0], atol=1e-5)


def test_pyramiddrops_schedule(source):
    assert PyramidDropPlanner(build(layers=32)).layers == (8, 16, 24)
    backbone = build(layers=8)
    encoding = EncodingBank(backbone, source).gather([0])
    published = PyramidDropPlanner(backbone, ratio=0.5).plan(encoding, ONE)
    assert backbone.visual_counts(published)[0].tolist() == [16, 16, 8, 8, 4, 4, 2, 2]


def test_sparsevlms_raters_and_schedule(small, source):
    encoding = EncodingBank(small, source).gather([0, 1])
    planner = SparseVLMPlanner(small, layers=(1, 2), shape=(0.5,))
    marked = planner.marked(encoding)
    for row in range(2):
        last = int(encoding.visual_places_BN[row].max())
        words = (encoding.text_places_BT[row] > last) & encoding.text_valid_BT[row]
        alike = (encoding.visual_BND[row] @ encoding.text_BTD[row, words].T).softmax(1).mean(0)
        expected = words.clone()
        expected[words] = alike > alike.mean()
        assert torch.equal(marked[row], expected) and 0 < int(marked[row].sum()) < int(words.sum())
    masks = planner.plan_counts(encoding, torch.tensor([9, 16]))
    assert small.visual_counts(masks).tolist() == [[16, 9, 4], [16, 16, 16]]
    deep = SparseVLMPlanner(build(layers=32))
    assert deep.layers == (3, 7, 16) and [round(300 * part) for part in deep.shape] == [300, 200, 110]


def test_shares_of_progressive_rules_are_means_over_layers(source):
    backbone = build(layers=8)
    encoding = EncodingBank(backbone, source).gather([0])
    for policy in ("pyramiddrop", "sparsevlm"):
        planner = load_planner(policy, backbone, 0)
        masks = planner.plan_counts(encoding, planner.shares(encoding, 0.5))
        counts = backbone.visual_counts(masks)[0].tolist()
        assert counts == sorted(counts, reverse=True) and 7 < sum(counts) / 8 <= 8
        more = backbone.visual_counts(planner.plan_counts(encoding, planner.shares(encoding, 0.5) + 1))
        assert float(more.double().mean()) > 8


@pytest.mark.parametrize(("removed", "billions"), [(0.5, 84.6), (0.75, 50.2), (0.9, 29.7)])
def test_fastvs_published_cost_from_the_plans_own_counts(removed, billions):
    """LLaVA-1.5-13B, K = 2, mean per layer in the paper's convention: 36 text tokens and what the stage leaves of 576.

    The paper does not round 57.6 tokens.
    """
    keep = (torch.tensor([576]) * (1 - removed)).round().long()
    counts = token_counts(torch.tensor([576]), [Stage(2, keep)], 40)[0].tolist()
    mean = sum(fastv_layer_macs(36 + count, 5120, 13824) for count in counts) / 40 / 1e9
    assert mean == pytest.approx(billions, abs=0.15)
    assert counts[1] == 576 and counts[2] == int(keep)


def test_fastvs_cost_in_our_convention():
    """Twice the MACs, three MLP matrices, and the output head; the first two layers at full length."""
    cuts = [13824 * slot // 40 for slot in range(41)]
    shape = DecoderShape(5120, 32000, (128,) * 40, (128,) * 40, tuple(stop - start for start, stop in pairwise(cuts)))
    masks = MaskLayout(576, 40, 40).full()
    counts = 36 + token_counts(torch.tensor([576]), [Stage(2, torch.tensor([288]))], 40)

    def layer(n):
        return 2 * n * (4 * 5120**2 + 3 * 5120 * 13824) + 4 * n * n * 5120

    assert int(shape.prefill(masks, counts)) == 2 * layer(612) + 38 * layer(324) + 2 * 5120 * 32000
