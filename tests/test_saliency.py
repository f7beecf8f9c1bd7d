"""What vision towers say of their patches: the attention matrices' own rows and means, token by token in order."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import apply_rotary_pos_emb_vision

from maskgym.backbones import EncodingBank, InputError
from maskgym.backbones.encodings.saliency import CLS_FEATURES, CLS_LAST, MEAN_FEATURES, MEAN_LAST, SIGNALS, hearing
from tests.conftest import build_of
from tests.families import BUILDERS
from tests.test_cost import counted

MEANS = [MEAN_LAST, MEAN_FEATURES]


def processed(backbone, source, number):
    return backbone.family.process([source[number].image], [backbone.prompt("")])


def split(x, heads):
    return x.unflatten(-1, (heads, -1)).transpose(-3, -2)


def clip_layers(backbone, batch, layer):
    """Queries and keys of a CLIP layer, from what enters it."""
    attention = backbone.model.model.vision_tower.encoder.layers[layer].self_attn
    with hearing({}, {"in": attention}) as heard, torch.no_grad():
        backbone.family.features(batch)
        h = heard["in"][1].get("hidden_states", heard["in"][0][0] if heard["in"][0] else None)
        return attention.q_proj(h), attention.k_proj(h)


def test_llavas_class_token(source):
    backbone = build_of("llava")  # features come from the layer before the last
    batch = processed(backbone, source, 0)
    with torch.no_grad():
        visual, said = backbone.family.observe(batch, list(SIGNALS))
        assert torch.equal(visual[0], backbone.family.features(batch)[0])
    q, k = clip_layers(backbone, batch, 1)
    undivided = (q @ k.transpose(1, 2) / 32**0.5).softmax(-1)[0]
    divided = (split(q, 4) @ split(k, 4).transpose(2, 3) / 8**0.5).softmax(-1)[0].mean(0)
    last = said[0][CLS_LAST]
    assert torch.allclose(last.received, undivided[0, 1:], atol=1e-6)
    assert torch.allclose(last.keys, k[0, 1:])
    assert torch.allclose(said[0][MEAN_LAST].received, divided.mean(0)[1:], atol=1e-6)
    q, k = clip_layers(backbone, batch, 0)
    divided = (split(q, 4) @ split(k, 4).transpose(2, 3) / 8**0.5).softmax(-1)[0].mean(0)
    assert torch.allclose(said[0][CLS_FEATURES].received, divided[0, 1:], atol=1e-6)
    assert torch.allclose(said[0][MEAN_FEATURES].received, divided.mean(0)[1:], atol=1e-6)
    assert torch.allclose(said[0][CLS_FEATURES].keys, split(k, 4)[0, :, 1:].mean(0))
    with torch.no_grad():
        assert torch.allclose(backbone.family.project(last.features), visual[0], atol=1e-6)
    assert counted(lambda: backbone.family.project(last.features)) == int(
        backbone.family.project_flops(torch.tensor(16))
    )


@pytest.mark.parametrize("number", [0, 2, 4, 6])
def test_llava_next_packs_them_as_its_tokens(source, number):
    backbone = build_of("llava_next")
    batch = processed(backbone, source, number)
    with hearing({"projected": backbone.model.model.multi_modal_projector}, {}) as heard, torch.no_grad():
        visual = backbone.family.features(batch)[0]
    projected = heard["projected"]
    said = backbone.family.by_image(batch, {"x": (projected[..., 0], projected, 7)}, projected, 1)[0]["x"]
    ends = (visual == backbone.model.model.image_newline).all(1)
    assert torch.equal(said.keys[~ends], visual[~ends]) and torch.equal(said.received[~ends], visual[~ends, 0])
    assert not said.received[ends].any() and said.flops == 7 * len(projected)


@pytest.mark.parametrize("name", ["idefics3", "smolvlm"])
def test_siglips_mean_attention(source, name):
    backbone = build_of(name)
    batch = processed(backbone, source, 2)
    attention = backbone.model.model.vision_model.encoder.layers[-1].self_attn
    with hearing({}, {"in": attention}) as heard, torch.no_grad():
        _, said = backbone.family.observe(batch, MEANS)
        h = heard["in"][1].get("hidden_states", heard["in"][0][0] if heard["in"][0] else None)
        q, k = attention.q_proj(h), attention.k_proj(h)
    weights = (split(q, 4) @ split(k, 4).transpose(2, 3) / 8**0.5).softmax(-1).mean((1, 2)).unflatten(1, (4, 4))
    token = 0
    for tile in range(len(weights)):
        for row in (0, 2):
            for column in (0, 2):
                square = weights[tile, row : row + 2, column : column + 2]
                assert float(said[0][MEAN_LAST].received[token]) == pytest.approx(float(square.mean()), abs=1e-6)
                patches = k[tile].unflatten(0, (4, 4))[row : row + 2, column : column + 2].mean((0, 1))
                assert torch.allclose(said[0][MEAN_LAST].keys[token], patches, atol=1e-6)
                token += 1
    assert token == len(said[0][MEAN_LAST].received)


@pytest.mark.parametrize("number", [0, 2, 4, 6])
def test_qwens_mean_attention(source, number):
    backbone = build_of("qwen2_5_vl")
    family, vision = backbone.family, backbone.model.model.visual
    batch = processed(backbone, source, number)
    attention = vision.blocks[1].attn
    with hearing({"merged": vision.merger}, {"in": attention}) as heard, torch.no_grad():
        visual, said = family.observe(batch, MEANS)
    order = family._raster(*family.grid(batch, 0)[1:])
    assert torch.equal(heard["merged"][order], visual[0]), "not the order of the visual tokens"
    arguments, named = heard["in"]
    with torch.no_grad():
        q, k, _ = attention.qkv(arguments[0] if arguments else named["hidden_states"]).unflatten(1, (3, 4, 8)).unbind(1)
    q, k = apply_rotary_pos_emb_vision(q, k, *named["position_embeddings"])
    weights = torch.einsum("phw,shw->hps", q, k).mul(8**-0.5).softmax(-1).mean((0, 1))
    assert torch.allclose(said[0][MEAN_LAST].received, weights.unflatten(0, (-1, 4)).mean(1)[order], atol=1e-6)


@pytest.mark.parametrize("name", BUILDERS)
def test_saliency_is_part_of_encodings_and_its_cost_the_counted_one(source, name):
    backbone = build_of(name)
    plain = counted(lambda: backbone.encode_images([source[2].image]))
    assert not backbone.encode([source[0]]).saliency
    for signal in backbone.family.signals:
        backbone.signals = {signal}
        image = backbone.encode_images([source[2].image])[0]
        assert counted(lambda: backbone.encode_images([source[2].image])) == plain + image.saliency[signal].flops
    backbone.signals = set()
    backbone.listen(backbone.family.signals[:1])
    backbone.listen(backbone.family.signals[1:])
    encoding = backbone.encode([source[number] for number in (0, 2, 4)])
    assert set(encoding.saliency) == set(backbone.family.signals)
    for signal, whole in encoding.saliency.items():
        assert whole.received.shape == (3, backbone.layout.tokens) and whole.flops.shape == (3,)
        alone = backbone.encode([source[4]]).saliency[signal]
        some = encoding.rows(torch.tensor([2])).saliency[signal]
        assert torch.allclose(some.received, alone.received, atol=1e-6) and torch.allclose(
            some.keys, alone.keys, atol=1e-6
        )
        assert not some.received[0, ~encoding.visual_valid_BN[2]].any()


def test_the_bank_asks_again_when_more_is_wanted(source):
    backbone = build_of("llava")
    bank = EncodingBank(backbone, source)
    first = bank.gather([0, 2])
    size = bank._bytes
    backbone.listen([CLS_LAST])
    second = bank.gather([0, 2])
    assert not first.saliency and set(second.saliency) == {CLS_LAST}
    assert torch.equal(first.visual_BND, second.visual_BND)
    assert bank._bytes == sum(image.nbytes for image in bank._kept.values()) > size


def test_of_threads_each_hears_its_own_image(source):
    """Hooks on the shared tower hear whoever runs it."""
    backbone = build_of("llava")
    backbone.listen([CLS_LAST])
    numbers = [0, 2, 4, 6] * 16
    alone = [backbone.encode([source[number]]).saliency[CLS_LAST].received for number in numbers]
    with ThreadPoolExecutor(8) as pool:
        together = pool.map(lambda number: backbone.encode([source[number]]).saliency[CLS_LAST].received, numbers)
        assert all(torch.equal(mine, theirs) for mine, theirs in zip(alone, together, strict=True))


def test_what_a_tower_lacks_is_named():
    backbone = build_of("idefics3")
    with pytest.raises(InputError, match=r"tower of 'idefics3' has no 'cls-last' .*; it has mean-last, mean-features"):
        backbone.listen([CLS_LAST])
