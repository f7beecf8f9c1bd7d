"""Every step of ``eval gpu`` on a narrow model of the same layout, on a device that refuses what CUDA refuses."""

import json
import time

import pytest
import torch

from eval.gpu import STEPS, Machine, Step, measure, table
from eval.launches import count_launches, counted
from tests.fake_cuda import fake_cuda

VISION = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
TEXT = {
    "vocab_size": 64,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
}


@pytest.mark.slow
def test_every_step_runs_on_cuda(tmp_path):
    with fake_cuda():
        results = measure(Machine("cuda", VISION, TEXT), tmp_path, 600, {name: Step(0.0, step.measure) for name, step in STEPS.items()})
    assert {name: result.get("error") for name, result in results.items()} == dict.fromkeys(STEPS)
    print(table(results))
    assert 0


def test_a_fake_device_refuses_what_cuda_refuses():
    with fake_cuda():
        there = torch.ones(3, device="cuda")
        assert there.device.type == "cuda" and (there + 1).is_cuda and not there.cpu().is_cuda
        with pytest.raises(RuntimeError, match="same device"):
            there + torch.ones(3)
        with pytest.raises(TypeError, match="numpy"):
            there.numpy()
        with pytest.raises(RuntimeError, match="indices"):
            torch.ones(3)[there.long()]
        model = torch.nn.Linear(3, 3).to("cuda")
        assert model(there).is_cuda and next(model.parameters()).device.type == "cuda"
        with torch.device("cuda"):
            assert torch.nn.Linear(3, 3).weight.is_cuda
