"""Times are not tested, their arithmetic is: what is measured, fitted and projected."""

import numpy as np
import pytest
import torch
from transformers import CLIPVisionConfig, CLIPVisionModel, LlamaConfig, LlamaForCausalLM

from maskgym.backbones import InputError
from maskgym.backbones.latency_model import FEATURES, LatencyModel, plan_features
from maskgym.eval.bench.engine import plan_at
from maskgym.eval.bench.first_token import first_token_figures
from maskgym.eval.bench.shapes import CLIP_LARGE, VICUNA_7B, encode_noise, llava_7b, llava_like
from maskgym.eval.measure.latency import Spread, calibrate, measure
from maskgym.policies.baselines import FullPlanner, RandomPlanner
from tests.conftest import random_masks


class CountingPlanner(FullPlanner):
    batches = ()

    def plan(self, encoding, budgets_B):
        self.batches = (*self.batches, tuple(encoding.ids))
        return super().plan(encoding, budgets_B)


def test_measure_times_every_batch_in_each_round(small, source):
    planner = CountingPlanner(small)
    measure(small, planner, [[source[0], source[3]], [source[2]]], 1.0, new_tokens=1, repeats=2, warm_up=1)
    assert planner.batches == (("q0", "q3"), ("q2",)) * 3


def test_measure_reports_every_part(small, source):
    batches = [[source[0], source[1]], [source[2], source[3]]]
    latency = measure(small, RandomPlanner(small), batches, 0.6, new_tokens=2, repeats=3, warm_up=1)
    for part in ("encode", "controller", "prefill", "ttft", "tpot"):
        spread = getattr(latency, part)
        assert 0 < spread.p50 <= spread.p95
    assert latency.ttft.p95 >= max(latency.encode.p50, latency.prefill.p50)
    assert latency.peak_memory_bytes > 0
    assert Spread.of([0.001, 0.002, 0.003]).p50 == pytest.approx(2)


def test_features_by_hand(small, source):
    encoding, masks = small.encode([source[0]]), small.layout.full()
    masks.layers[0, 2] = False
    masks.heads[0, 1, :2] = False
    masks.tokens[0, 5:] = False
    features = dict(zip(FEATURES, plan_features(small, encoding, masks)[0].tolist(), strict=True))
    cost = small.cost(encoding, masks).prefill - 2 * 32 * small.decoder.shape.vocab
    assert features["one call"] == 1 and features["layers run"] == 2
    slot = 4 * 32 * 8 + 3 * 32 * 11
    assert features["weights read"] == pytest.approx(6 * slot / 1e6)
    assert features["linear FLOPs"] + features["attention FLOPs"] == pytest.approx(float(cost) / 1e9)


def known_model(backbone):
    return LatencyModel("here", backbone.name, (0.5, 0.2, 1.0, 30.0, 50.0), 0.0)


def test_fit_finds_a_known_model(small, source):
    rng = np.random.default_rng(0)
    encoding = small.encode([source[number % 12] for number in range(60)])
    masks = random_masks(small, 60, seed=1)
    truth = known_model(small)
    milliseconds = truth.predict(small, encoding, masks).numpy() * rng.normal(1, 0.005, 60)
    fitted = LatencyModel.fit("here", "test", plan_features(small, encoding, masks).numpy(), milliseconds)
    assert fitted.error < 0.01
    predicted = fitted.predict(small, encoding, masks).numpy()
    assert np.abs(predicted / milliseconds - 1).max() < 0.05
    shuffled = LatencyModel.fit(
        "here", "test", plan_features(small, encoding, masks).numpy(), rng.permutation(milliseconds)
    )
    assert shuffled.error > 0.03, "an error that noise cannot raise would say nothing"


def test_calibration_measures_and_saves(small, source, tmp_path):
    model = calibrate(small, [source[0], source[3]], plans=12, repeats=2)
    assert min(model.weights) >= 0 and max(model.weights) > 0 and "CPU" in model.device
    model.save(tmp_path / "latency.json")
    assert LatencyModel.load(tmp_path / "latency.json") == model
    for content in ("", "{}", '{"device": 1, "backbone": 2, "weights": [-1, 0, 0, 0, 0], "error": 0}'):
        (tmp_path / "bad.json").write_text(content)
        with pytest.raises(InputError, match="no readable latency model"):
            LatencyModel.load(tmp_path / "bad.json")


@pytest.mark.parametrize("axis", ["tokens", "layers", "heads", "all"])
@pytest.mark.parametrize(("share", "scattered"), [(0.5, False), (0.25, False), (0.25, True)])
def test_bench_plans_cost_what_they_say(axis, share, scattered):
    backbone = llava_like(hidden=64, layers=8, heads=16, intermediate=176)
    encoding = encode_noise(backbone, 1)
    assert int(encoding.text_tokens[0]) == 40 and backbone.layout.tokens == 576
    plan = plan_at(backbone, encoding, axis, share, scattered)
    spent = backbone.cost(encoding, plan).llm / backbone.full_llm_flops(encoding)
    assert float(spent) == pytest.approx(share, abs=0.04)
    differ = bool((plan.heads != plan.heads[:, :1]).any())
    assert differ == (scattered and axis in ("heads", "all"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.slow
def test_the_first_token_is_timed_part_by_part(dtype):
    vision = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    text = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
    backbone = llava_7b("cpu", dtype, vision, text)
    assert backbone.layout.tokens == 576 and backbone.model.dtype == dtype
    figures = dict(first_token_figures(backbone, repeats=3, keep=64))
    assert min(figures.values()) > 0
    assert figures["ttft_ms_full"] > max(figures["encode_ms_full"], figures["prefill_ms_full"])
    assert figures["ttft_ms_64_tokens"] > figures["controller_ms_64_tokens"]


def test_the_large_shape_is_llavas():
    """Parameters and visual tokens of the published LLaVA-1.5-7B, counted without making the weights."""
    with torch.device("meta"):
        tower, text = CLIPVisionModel(CLIPVisionConfig(**CLIP_LARGE)), LlamaForCausalLM(LlamaConfig(**VICUNA_7B))
    counts = [sum(parameter.numel() for parameter in model.parameters()) for model in (tower, text)]
    assert counts == [303_507_456, 6_738_939_904]
