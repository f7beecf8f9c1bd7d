"""The cost model equals the counted FLOPs to the last one, and the published figures."""

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from maskgym.backbones import EncodingBank
from maskgym.backbones.plans.cost import DecoderShape, clip_tower_flops, mlp_flops
from maskgym.backbones.plans.masks import MaskLayout
from maskgym.backbones.plans.published_cost import (
    adallava_layer_share,
    adallava_prefill_flops,
    fastv_layer_macs,
    fastv_mean_layer_macs,
)
from maskgym.envs.data.queries import load_queries
from maskgym.policies.controller.decisions import Decider
from maskgym.policies.controller.network import ControllerConfig, TwoLevelController
from tests.conftest import random_masks


def counted(function) -> int:
    """FLOPs of a call; under the math backend, since the counter does not see fused attention on the CPU."""
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH), torch.no_grad():
        function()
    return counter.get_total_flops()


@pytest.mark.parametrize("number", range(12))
def test_prefill_of_single_plans(backbone, bank, number):
    encoding = bank.gather([number])
    masks = backbone.layout.full() if number == 0 else random_masks(backbone, 1, seed=number)
    cost = backbone.cost(encoding, masks)
    assert counted(lambda: backbone.prefill(encoding, masks)) == int(cost.prefill)


def test_mixed_batch_of_equal_lengths_costs_the_sum_of_its_rows(backbone, bank):
    encoding = bank.gather([0] * 6)
    masks = random_masks(backbone, 6, seed=3)
    masks.tokens[:] = masks.tokens[0]  # equal lengths: no padding in attention
    cost = backbone.cost(encoding, masks)
    assert counted(lambda: backbone.prefill(encoding, masks)) == int(cost.prefill.sum())


@pytest.mark.parametrize("seed", range(4))
def test_decode_steps(backbone, bank, seed):
    encoding, masks = bank.gather([1]), random_masks(backbone, 1, seed=seed)
    ids = torch.tensor([[5], [6], [7]])

    def decode(steps: int) -> None:
        _, kv = backbone.prefill(encoding, masks, cache=True)
        for step in range(steps):
            backbone.extend(ids[step][None], encoding.next_rope_B + step, kv)

    for new_tokens in (1, 2, 4):
        cost = backbone.cost(encoding, masks, new_tokens=new_tokens)
        assert counted(lambda n=new_tokens: decode(n - 1)) == int(cost.prefill + cost.decode)


@pytest.mark.parametrize("number", [0, 2, 4, 6])
def test_vision_tower_and_projector(backbone, source, number):
    image = backbone.encode_images([source[number].image])[0]
    flops = counted(lambda: backbone.encode_images([source[number].image]))
    assert flops == image.vision_flops + image.projector_flops


@pytest.mark.parametrize("text_numbers", [[0], [1]])
def test_controller(backbone, bank, text_numbers):
    encoding = bank.gather(text_numbers)
    controller = TwoLevelController(ControllerConfig.for_layout(backbone.layout, backbone.hidden))
    decider = Decider(controller, backbone)
    budgets = torch.tensor([0.5])

    def decide() -> None:
        decider.decide(decider.read(encoding, budgets), sample=True)

    assert counted(decide) == int(controller.flops(encoding.text_tokens)[0])


def test_budget_one_is_the_full_plan(backbone, bank):
    encoding = bank.gather([0, 1])
    assert torch.equal(backbone.full_llm_flops(encoding), backbone.cost(encoding, backbone.layout.full(2)).llm)


def test_dropped_layer_and_its_heads_cost_nothing(small, source):
    masks = small.layout.full()
    masks.layers[0, 1] = False
    without_heads = small.layout.full()
    without_heads.heads[0, 1] = False
    encoding = small.encode([source[0]])
    assert small.cost(encoding, masks).llm == small.cost(encoding, without_heads).llm < small.full_llm_flops(encoding)


LLAVA_7B = {"layers": 32, "hidden": 4096, "intermediate": 11008, "heads": 32, "vocab": 32000}


def test_llava_7b_shape_against_stock_formulas():
    """2 x MACs of linears and attention, 640 tokens, plus the head once: 8.48 T; the analyser of AdaLLaVA, which adds
    elementwise work, has 8.51 T."""
    shape = DecoderShape(4096, 32000, (128,) * 32, (128,) * 32, (344,) * 32)
    flops = shape.prefill(MaskLayout(576, 32, 32).full(), torch.tensor([640]))
    assert int(flops) == 32 * (2 * 640 * (4 * 4096**2 + 3 * 4096 * 11008) + 4 * 640**2 * 4096) + 2 * 4096 * 32000
    assert int(flops) / adallava_prefill_flops(640, **LLAVA_7B) == pytest.approx(1, abs=0.005)


def test_clip_tower_and_projector_of_llava():
    clip = clip_tower_flops(336, 14, 3, 1024, 24, 4096)
    assert clip / 1e12 == pytest.approx(0.381, rel=0.005)
    assert mlp_flops(576, 1024, 4096, 4096) / 1e12 == pytest.approx(0.024, abs=5e-4)


def test_controller_is_at_most_one_percent_of_a_7b_prefill(tiny):
    controller = TwoLevelController(ControllerConfig(576, 32, 32, 4096))
    shape = DecoderShape(4096, 32000, (128,) * 32, (128,) * 32, (344,) * 32)
    full = shape.prefill(MaskLayout(576, 32, 32).full(), torch.tensor([640]))
    assert controller.flops(torch.tensor([64])) <= 0.01 * full
    embedded = TwoLevelController(ControllerConfig.for_layout(tiny.layout, tiny.hidden))
    encoding = EncodingBank(tiny, load_queries("easy-vqa", "test", 50)).gather(range(50))
    assert (embedded.flops(encoding.text_tokens) <= 0.01 * tiny.full_llm_flops(encoding)).all()


def test_fastv_figures():
    assert fastv_layer_macs(612, 4096, 11008) / 1e9 == pytest.approx(99.3, abs=0.05)
    assert fastv_layer_macs(612, 5120, 13824) / 1e9 == pytest.approx(154.64, abs=0.005)
    assert fastv_layer_macs(324, 5120, 13824) / 1e9 == pytest.approx(80.91, abs=0.005)
    for removed, thirteen_b in ((0.5, 84.6), (0.75, 50.2), (0.9, 29.7)):
        assert fastv_mean_layer_macs(36, 576, 40, 5120, 13824, 2, removed) / 1e9 == pytest.approx(thirteen_b, abs=0.05)
    for removed, seven_b in ((0.5, 54.8), (0.75, 33.0)):
        assert fastv_mean_layer_macs(36, 576, 32, 4096, 11008, 2, removed) / 1e9 == pytest.approx(seven_b, abs=0.05)


@pytest.mark.parametrize(("n", "tera"), [(612, 8.13), (640, 8.51), (690, 9.19), (70, 0.91), (220, 2.88)])
def test_adallava_analyser_figures(n, tera):
    assert adallava_prefill_flops(n, **LLAVA_7B) / 1e12 == pytest.approx(tera, abs=0.006)


def test_adallava_levels():
    assert adallava_layer_share(0.85, 32) == 0.84375
    assert adallava_layer_share(0.60, 32) == 0.59375
    assert adallava_layer_share(0.30, 32) == 0.5


def test_fastv_k2_r50_in_adallavas_analyser():
    full, kept = (adallava_prefill_flops(n, **LLAVA_7B) for n in (640, 640 - 288))
    assert (2 * full + 30 * kept) / 32 / 1e12 == pytest.approx(4.87, abs=0.03)
