"""How kept tokens are laid out: by hand on tiny examples, against masking, in batches, with a cache, and the cost."""

from dataclasses import replace

import pytest
import torch

from maskgym.backbones import EncodingBank, InputError, Masks
from maskgym.backbones.engine.arrange import arrange, group_medians, group_sizes, owners
from maskgym.backbones.plans.survivors import POSITIONS, Survivors
from tests.conftest import random_masks
from tests.masked_reference import masked_logits
from tests.test_cost import counted
from tests.test_stages import ROWS, staged

LAYOUTS = [("renumbered", False), ("original", True), ("renumbered", True), ("restored", True)]


def laid_out(masks, positions, merge=False, **more):
    return replace(masks, survivors=replace(Survivors.plain(len(masks), positions, merge), **more))


def varied(backbone, encoding, seed=1):
    """Every layout in one batch, one row without any drop, one that keeps no visual token, an order and targets."""
    rows, generator = len(encoding), torch.Generator().manual_seed(seed)
    masks = random_masks(backbone, rows, seed, keep=0.5)
    masks.tokens[1] = True
    masks.tokens[2] = False
    parts = [laid_out(masks[row : row + 1], *LAYOUTS[row % 4]) for row in range(rows)]
    masks = Masks.cat(parts)
    order = torch.rand(rows, backbone.layout.tokens, generator=generator)
    targets = torch.rand(rows, backbone.layout.tokens, generator=generator) < 0.7
    return replace(masks, survivors=replace(masks.survivors, order=order, targets=targets))


def test_laying_out_is_exact(backbone, bank):
    encoding = bank.gather(ROWS)
    masks = backbone.restrict(encoding, varied(backbone, encoding))
    with torch.no_grad():
        logits, _ = backbone.prefill(encoding, masks)
        for row in range(len(ROWS)):
            assert torch.allclose(logits[row], masked_logits(backbone, encoding, masks, row), atol=1e-4, rtol=0)
        plain, _ = backbone.prefill(encoding, replace(masks, survivors=None))
    changed = (plain - logits).abs().amax(1) > 1e-4
    assert not changed[[1, 2]].any(), "a row that drops nothing, or keeps nothing, has been laid out"
    assert changed[[3, 5, 7]].all()


def test_stages_go_with_a_layout(backbone, bank):
    encoding = bank.gather(ROWS)
    masks = replace(varied(backbone, encoding), stages=staged(backbone, encoding, None).stages)
    masks.layers[:, 0] = True
    masks = backbone.restrict(encoding, masks)
    with torch.no_grad():
        logits, _ = backbone.prefill(encoding, masks)
        for row in range(len(ROWS)):
            expected = masked_logits(backbone, encoding, masks, row)
            assert torch.allclose(logits[row], expected, atol=1e-4, rtol=0)


def test_a_mixed_batch_gives_what_its_rows_give_alone(backbone, bank):
    encoding = bank.gather(ROWS)
    masks = varied(backbone, encoding, seed=4)
    with torch.no_grad():
        together, _ = backbone.prefill(encoding, masks)
        for row, number in enumerate(ROWS):
            alone, _ = backbone.prefill(bank.gather([number]), masks[row : row + 1])
            assert torch.allclose(together[row], alone[0], atol=1e-4, rtol=0)


@pytest.mark.parametrize(("positions", "merge"), LAYOUTS[:3])
def test_cached_decoding_equals_recomputing(backbone, bank, positions, merge):
    encoding = bank.gather([0, 1, 2, 3])
    masks = laid_out(random_masks(backbone, 4, seed=6, keep=0.5), positions, merge)
    more = torch.randint(4, 12, (4, 3), generator=torch.Generator().manual_seed(0))
    images = backbone.encode_images([bank.source[number].image for number in range(4)])
    questions = [bank.source.text(number)[1] for number in range(4)]
    with torch.no_grad():
        _, kv = backbone.prefill(encoding, masks, cache=True)
        fork = kv.fork()
        cached = [backbone.extend(more[:, [step]], encoding.next_rope_B + step, kv)[:, 0] for step in range(3)]
        at_once = backbone.extend(more, encoding.next_rope_B, fork)
        for taken in (1, 2, 3):
            grown = backbone.assemble(images, questions, continuations=more[:, :taken].tolist())
            expected, _ = backbone.prefill(grown, masks)
            assert torch.allclose(cached[taken - 1], expected, atol=1e-4, rtol=0)
            assert torch.allclose(at_once[:, taken - 1], expected, atol=1e-4, rtol=0)


def test_answers_to_restored_tokens_see_their_sizes_and_no_distance(small, source):
    """By hand in one layer: softmax(q k + log size) over what the cache holds."""
    encoding = EncodingBank(small, source).gather([0])
    masks = small.layout.full()
    masks.tokens[0, 3:] = False
    masks.layers[0, 1:] = False
    masks = laid_out(masks, "restored")
    with torch.no_grad():
        _, kv = small.prefill(encoding, masks, cache=True)
        block = kv.blocks[0][0]
        keys, values = block.keys.clone(), block.values.clone()
        logits = small.extend(torch.tensor([[7]]), encoding.next_rope_B, kv)[0, 0]
        layer, model = small.decoder.model.layers[0], small.decoder.model
        x = model.embed_tokens(torch.tensor([[7]]))
        cos, sin = model.rotary_emb(x, encoding.next_rope_B[:, None])
        h = layer.input_layernorm(x)
        q, k, v = (
            linear(h).unflatten(-1, (-1, 8)).transpose(1, 2)
            for linear in (layer.self_attn.q_proj, layer.self_attn.k_proj, layer.self_attn.v_proj)
        )
        turn = [torch.cat((-y[..., 4:], y[..., :4]), -1) for y in (q, k)]
        q, k = q * cos[:, None] + turn[0] * sin[:, None], k * cos[:, None] + turn[1] * sin[:, None]
        keys, values = torch.cat([keys, k], 2), torch.cat([values, v], 2)
        sizes = torch.ones(1, 1, 1, keys.shape[2])
        start = int(encoding.visual_places_BN[0, 0])  # so many words stand before the image
        sizes[..., start : start + 3] = 16 / 3  # the first layer takes the mean
        weights = (q @ keys.transpose(2, 3) * layer.self_attn.scaling + sizes.log()).softmax(-1)
        x = x + layer.self_attn.o_proj((weights @ values).transpose(1, 2).flatten(2))
        x = x + layer.mlp(layer.post_attention_layernorm(x))
        assert torch.allclose(small.model.lm_head(model.norm(x))[0, 0], logits, atol=1e-5)


@pytest.mark.parametrize("number", range(4))
@pytest.mark.parametrize(("positions", "merge"), LAYOUTS)
def test_the_cost_is_the_counted_one(backbone, bank, number, positions, merge):
    encoding = bank.gather([number])
    masks = laid_out(random_masks(backbone, 1, seed=number, keep=0.5), positions, merge)
    masks = replace(masks, stages=staged(backbone, encoding, None, seed=number).stages)
    cost = backbone.cost(encoding, masks)
    assert counted(lambda: backbone.prefill(encoding, masks)) == int(cost.llm)
    assert bool(cost.controller > 0) == merge


def tiny_example(small, source, kept):
    """Visual tokens on a line: token i points in the direction of its angle; 16 tokens, some kept."""
    encoding = EncodingBank(small, source).gather([0])
    angles = torch.tensor([0, 1, 2, 10, 11, 12, 20, 21, 30, 31, 32, 33, 40, 41, 50, 51]) * torch.pi / 180
    visual = torch.zeros(1, 16, 32)
    visual[0, :, 0], visual[0, :, 1] = angles.cos(), angles.sin()
    masks = small.layout.full()
    masks.tokens[0] = False
    masks.tokens[0, list(kept)] = True
    return replace(encoding, visual_BND=visual), masks


def test_merging_by_hand(small, source):
    encoding, masks = tiny_example(small, source, (0, 4, 9))
    owner = owners(encoding, masks)
    assert owner[0].tolist() == [0, 0, 0, 4, 4, 4, 4, 4, 9, 9, 9, 9, 9, 9, 9, 9]
    assert group_sizes(owner, encoding.visual_valid_BN)[0, [0, 4, 9]].tolist() == [3, 5, 8]
    merged = arrange(encoding, laid_out(masks, "original", True)).encoding
    assert torch.allclose(merged.visual_BND[0, 0], encoding.visual_BND[0, :3].mean(0))
    assert torch.allclose(merged.visual_BND[0, 9], encoding.visual_BND[0, 8:].mean(0))
    assert torch.equal(merged.visual_rope_BNR, encoding.visual_rope_BNR)
    only = laid_out(masks, "original", True, targets=torch.arange(16)[None] == 9)
    owner = owners(encoding, only, only.survivors.targets)
    assert owner[0].tolist() == [0, 9, 9, 9, 4, *[9] * 11]


def test_renumbering_by_hand(small, source):
    encoding, masks = tiny_example(small, source, (0, 4, 9))
    first = int(encoding.visual_places_BN[0, 0])
    closed = arrange(encoding, laid_out(masks, "renumbered")).encoding
    assert closed.visual_rope_BNR[0, [0, 4, 9], 0].tolist() == [first, first + 1, first + 2]
    after = encoding.text_places_BT[0] > first
    assert torch.equal(closed.text_rope_BTR[0, after], encoding.text_rope_BTR[0, after] - 13)
    assert closed.next_rope_B.tolist() == [int(encoding.next_rope_B) - 13]
    order = torch.zeros(1, 16)
    order[0, [0, 4, 9]] = torch.tensor([2.0, 0.0, 1.0])
    turned = arrange(encoding, laid_out(masks, "renumbered", order=order)).encoding
    assert turned.visual_rope_BNR[0, [4, 9, 0], 0].tolist() == [first, first + 1, first + 2]
    assert turned.visual_places_BN[0, [4, 9, 0]].tolist() == encoding.visual_places_BN[0, [0, 4, 9]].tolist()


def test_renumbering_closes_up_rows_and_columns(source):
    from tests.conftest import build_of

    backbone = build_of("qwen2_5_vl")
    encoding = backbone.encode([source[0]])
    grid = encoding.visual_rope_BNR[0, encoding.visual_valid_BN[0]]  # (time, height, width)
    masks = backbone.layout.full()
    masks.tokens[0, : len(grid)] = grid[:, 1] != grid[0, 1] + 1  # one row of the grid goes
    masks = backbone.restrict(encoding, masks)
    closed = arrange(encoding, laid_out(masks, "renumbered")).encoding
    kept = masks.tokens[0]
    heights = closed.visual_rope_BNR[0, kept, 1]
    width = int((grid[:, 1] == grid[0, 1]).sum())
    assert heights.unique().numel() == len(grid) // width - 1
    assert int(closed.text_rope_BTR[0, encoding.text_valid_BT[0]].amax()) < int(closed.next_rope_B)
    text = closed.text_rope_BTR[0, encoding.text_valid_BT[0]]
    assert (text == text[:, :1]).all(), "text must stay at one position in all components"


def test_medians_by_hand():
    values = torch.tensor([[10, 11, 12, 13, 14, 15, 16, 17]])
    owner = torch.tensor([[0, 6, 0, 0, 6, 6, 6, 7]])
    valid = torch.ones(1, 8, dtype=torch.bool)
    sizes = group_sizes(owner, valid)
    medians = group_medians(values, owner, sizes, valid)
    assert medians[0, [0, 6, 7]].tolist() == [12, 14, 17]  # of 10 12 13; of 11 14 15 16, the lower; of 17
    valid[0, 5] = False
    assert group_medians(values, owner, group_sizes(owner, valid), valid)[0, 6].tolist() == 14  # of 11 14 16


def test_restored_tokens_stand_at_their_medians(small, source):
    encoding, masks = tiny_example(small, source, (0, 4, 9))
    arranged = arrange(encoding, laid_out(masks, "restored"))
    first = int(encoding.visual_places_BN[0, 0])
    assert (arranged.encoding.visual_rope_BNR[0, [0, 4, 9], 0] - first).tolist() == [1, 5, 11]
    assert arranged.sizes_BN[0, [0, 4, 9]].tolist() == [3, 5, 8] and arranged.restored_B.tolist() == [True]
    assert arranged.encoding.next_rope_B.equal(encoding.next_rope_B)


def test_positions_are_checked():
    with pytest.raises(InputError, match="positions are 'kept'; they must be one of original, renumbered, restored"):
        Survivors.plain(1, "kept")
    assert POSITIONS == ("original", "renumbered", "restored")
