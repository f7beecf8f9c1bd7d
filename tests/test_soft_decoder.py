"""Relaxed plans: exact at 0 and 1, blind to what is dropped, and with a gradient for every decision."""

import math
from dataclasses import replace

import pytest
import torch

from maskgym.backbones.soft_decoder import CEILING, Gates, _GatedSoftmax, soft_answer_logits, soft_llm_flops
from tests.conftest import build, random_masks

NUMBERS = [0, 1, 2, 3, 4, 5]


def answered(backbone, bank):
    """Prompts, the same followed by answers of different lengths, and those answers."""
    answers = [[7], [5, 6], [], [4], [8, 9, 4], [6]]
    images = backbone.encode_images([bank.source[number].image for number in NUMBERS])
    questions = [bank.source.text(number)[1] for number in NUMBERS]
    return bank.gather(NUMBERS), backbone.assemble(images, questions, continuations=answers), answers


@pytest.mark.parametrize("keep", [0.4, 0.8])
def test_hard_gates_give_the_executed_plans_logits(backbone, bank, keep):
    prompts, encoding, answers = answered(backbone, bank)
    masks = random_masks(backbone, len(NUMBERS), seed=3, keep=keep)
    with torch.no_grad():
        soft = soft_answer_logits(backbone, encoding, Gates.of(masks), answers)
        first, kv = backbone.prefill(prompts, masks, cache=True)
        ids = torch.nn.utils.rnn.pad_sequence([torch.tensor(row, dtype=torch.long) for row in answers], True)
        later = backbone.extend(ids, prompts.next_rope_B, kv)
    hard = [torch.cat([first[row, None], later[row, : len(own)]]) for row, own in enumerate(answers)]
    assert torch.allclose(soft, torch.cat(hard), atol=2e-4, rtol=0)


def test_dropped_tokens_do_not_leak(small, source):
    encoding = small.encode([source[0], source[2]])
    gates = Gates.of(small.layout.full(2))
    gates.tokens[:, ::2] = 0
    with torch.no_grad():
        before = soft_answer_logits(small, encoding, gates, [[], []])
        encoding.visual_BND[:, ::2] = torch.randn(2, 8, small.hidden) * 50
        after = soft_answer_logits(small, encoding, gates, [[], []])
        gates.tokens[:, 0] = 0.01
        leaked = soft_answer_logits(small, encoding, gates, [[], []])
    assert torch.equal(before, after) and (leaked - before).abs().max() > 1e-4


def test_every_decision_gets_a_gradient_kept_or_dropped(backbone, bank):
    _, encoding, answers = answered(backbone, bank)
    gates = Gates.of(random_masks(backbone, len(NUMBERS), seed=4))
    for gate in (gates.tokens, gates.heads, gates.layers):
        gate.requires_grad_()
    soft_answer_logits(backbone, encoding, gates, answers).log_softmax(-1)[:, 5].sum().backward()
    assert torch.isfinite(gates.tokens.grad).all()
    # The last layer mixes tokens too, so each visual token that is there matters.
    assert (gates.tokens.grad[encoding.visual_valid_BN] != 0).float().mean() > 0.95
    assert (gates.tokens.grad[~encoding.visual_valid_BN] == 0).all()
    runs = gates.layers.detach().bool()
    assert (gates.heads.grad[runs] != 0).all() and (gates.heads.grad[~runs] == 0).all()
    has_heads = gates.heads.detach().any(2) | (backbone.decoder.width == "heads")
    assert (gates.layers.grad[has_heads] != 0).all(), "a layer without heads adds nothing, kept or not"


def test_half_precision_weights_take_the_same_gates(source):
    """Logits and gradients are float32, and near those of the same weights in float32."""
    backbone = build(seed=5)
    found = []
    for dtype in (torch.float32, torch.bfloat16):
        backbone.model.to(dtype)
        gates = Gates.of(random_masks(backbone, 2, seed=4))
        gates.heads.requires_grad_()
        encoding = backbone.encode([source[0], source[2]])
        logits = soft_answer_logits(backbone, encoding, gates, [[], []])
        logits.log_softmax(-1)[:, 5].sum().backward()
        assert logits.dtype == gates.heads.grad.dtype == torch.float32
        found.append((logits.detach(), gates.heads.grad))
    for exact, rounded in zip(*found, strict=True):
        assert 0 < (exact - rounded).abs().max() < 0.05 * exact.abs().max()


def test_gradients_are_those_of_small_steps(small, source):
    """Against finite differences, at relaxed gates; in float64 the difference is the formula's own."""
    encoding = small.encode([source[0]])
    torch.manual_seed(0)
    layout = small.layout
    shapes = ((1, layout.tokens), (1, layout.layers, layout.heads), (1, layout.layers))
    parts = [torch.rand(shape).mul(0.8).add(0.1).requires_grad_() for shape in shapes]

    def value(tensors):
        return soft_answer_logits(small, encoding, Gates(*tensors), [[]]).log_softmax(-1)[0, 5]

    value(parts).backward()
    for which, place in ((0, (0, 3)), (1, (0, 1, 2)), (2, (0, 2))):
        ends = []
        for step in (-1e-2, 1e-2):
            moved = [part.detach().clone() for part in parts]
            moved[which][place] += step
            ends.append(float(value(moved)))
        slope = (ends[1] - ends[0]) / 2e-2
        assert float(parts[which].grad[place]) == pytest.approx(slope, rel=0.05, abs=2e-4)


@pytest.mark.parametrize("answer", [1, 5, torch.arange(1, len(NUMBERS) + 1)], ids=str)
def test_the_relaxed_cost_is_the_cost_at_hard_gates(backbone, bank, answer):
    encoding = replace(bank.gather(NUMBERS), expected_tokens=answer)
    masks = random_masks(backbone, len(NUMBERS), seed=6)
    relaxed = soft_llm_flops(backbone, encoding, Gates.of(masks), 1000)
    assert torch.equal(relaxed.long(), backbone.cost(encoding, masks, 1000).llm)


def test_the_relaxed_cost_rises_with_every_gate(small, source):
    encoding = small.encode([source[0]])
    gates = Gates(*(gate.mul(0.5).requires_grad_() for gate in vars(Gates.of(small.layout.full())).values()))
    soft_llm_flops(small, encoding, gates).sum().backward()
    for gate in (gates.tokens, gates.heads, gates.layers):
        assert (gate.grad > 0).all()


def test_gates_of_next_to_nothing_have_small_gradients():
    """The most attractive key is one that is hardly there: its gate's derivative is at most exp(CEILING) times what
    the others weigh, where the formula's would be 1e34."""
    present = torch.tensor([[1.0, 1e-37, 0.5]], requires_grad=True)
    logits = torch.tensor([0.0, 80.0, 1.0]).expand(1, 1, 3, 3).clone().requires_grad_()
    weights = _GatedSoftmax.apply(logits, present)
    assert torch.allclose(weights[0, 0, 2], torch.tensor([1, 0, 0.5 * math.e]) / (1 + 0.5 * math.e))
    (weights * torch.randn(3, 3)).sum().backward()
    assert (present.grad.abs() < 10 * math.exp(CEILING)).all() and torch.isfinite(logits.grad).all()
