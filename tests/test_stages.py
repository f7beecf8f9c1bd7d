"""Visual tokens that leave inside the decoder: removed is masked, alone or in a batch, cached or not; and the cost."""

from dataclasses import dataclass, replace

import pytest
import torch

from maskgym.backbones import EncodingBank, InputError, Masks
from maskgym.backbones.plans.stages import EVERYTHING, AttentionScore, Stage, best_tokens, token_counts
from maskgym.policies.planning.projection import project
from tests.conftest import random_masks
from tests.masked_reference import masked_logits
from tests.test_cost import counted

ROWS = [row % 12 for row in range(8)]
SCORERS = [
    AttentionScore("last"),
    AttentionScore("all"),
    AttentionScore("marked"),
    AttentionScore("last", here=True),
    AttentionScore("marked", here=True),
]


def some_text(encoding):
    marked = torch.zeros(encoding.text_valid_BT.shape, dtype=torch.bool)
    marked[:, -9:-2] = True
    return marked & encoding.text_valid_BT


def staged(backbone, encoding, scorer=None, layers=(1, 2), seed=0, keep=0.9):
    """Random plans that attend in the first layer, with random counts at each stage; some rows are left alone."""
    rows, generator = len(encoding), torch.Generator().manual_seed(seed)
    masks = random_masks(backbone, rows, seed, keep)
    masks.layers[:, 0] = True
    masks.heads[:, 0, 0] = True
    stages = []
    for layer in layers:
        counts = torch.randint(0, backbone.layout.tokens, (rows,), generator=generator)
        counts[:: 3 + layer] = EVERYTHING
        scores = torch.rand(rows, backbone.layout.tokens, generator=generator) if scorer is None else None
        stages.append(Stage(layer, counts, scores, scorer, some_text(encoding)))
    return replace(masks, stages=tuple(stages))


@pytest.mark.parametrize("scorer", [None, *SCORERS])
def test_removing_is_masking(backbone, bank, scorer):
    encoding = bank.gather(ROWS)
    masks = staged(backbone, encoding, scorer)
    with torch.no_grad():
        logits, _ = backbone.prefill(encoding, masks)
        for row in range(len(ROWS)):
            assert torch.allclose(logits[row], masked_logits(backbone, encoding, masks, row), atol=1e-4, rtol=0)
        plain, _ = backbone.prefill(encoding, replace(masks, stages=()))
    assert (plain - logits).abs().max() > 1e-3, "the stages do nothing"


@pytest.mark.parametrize("scorer", [None, SCORERS[0], SCORERS[4]])
def test_a_mixed_batch_gives_what_its_rows_give_alone(backbone, bank, scorer):
    encoding = bank.gather(ROWS)
    masks = staged(backbone, encoding, scorer, seed=3)
    with torch.no_grad():
        together, _ = backbone.prefill(encoding, masks)
        for row, number in enumerate(ROWS):
            own = masks[row : row + 1]
            alone, _ = backbone.prefill(bank.gather([number]), own)
            assert torch.allclose(together[row], alone[0], atol=1e-4, rtol=0)


def test_parts_put_together_keep_their_stages(small, source):
    bank = EncodingBank(small, source)
    encoding = bank.gather(ROWS)
    parts = [
        staged(small, encoding, SCORERS[0])[:3],
        random_masks(small, 2),
        staged(small, encoding, None)[:2],
        staged(small, encoding, SCORERS[0], seed=2)[7:8],
    ]
    masks = Masks.cat(parts)
    assert [(stage.layer, stage.scorer) for stage in masks.stages] == [
        (1, SCORERS[0]),
        (1, None),
        (2, SCORERS[0]),
        (2, None),
    ]
    rows = [0, 1, 2, 3, 4, 0, 1, 7]
    with torch.no_grad():
        together, _ = small.prefill(bank.gather(rows), masks)
        start = 0
        for part in parts:
            own, _ = small.prefill(bank.gather(rows[start : start + len(part)]), part)
            assert torch.allclose(together[start : start + len(part)], own, atol=1e-5, rtol=0)
            start += len(part)
    again = masks.where(torch.arange(8) % 2 == 0, masks)
    assert len(again.stages) == 4, "putting together piles up stages"


def test_cached_decoding_equals_recomputing(backbone, bank):
    """Pruned once, at the prefill: the layers before a stage keep all keys."""
    encoding = bank.gather([0, 1, 2, 3])
    masks = staged(backbone, encoding, None, seed=8)
    more = torch.randint(4, 12, (4, 4), generator=torch.Generator().manual_seed(0))
    images = backbone.encode_images([bank.source[number].image for number in range(4)])
    questions = [bank.source.text(number)[1] for number in range(4)]
    with torch.no_grad():
        _, kv = backbone.prefill(encoding, masks, cache=True)
        cached = [backbone.extend(more[:, :2], encoding.next_rope_B, kv)[:, -1]]
        cached += [backbone.extend(more[:, [step]], encoding.next_rope_B + step, kv)[:, 0] for step in (2, 3)]
        for taken, logits in zip((2, 3, 4), cached, strict=True):
            grown = backbone.assemble(images, questions, continuations=more[:, :taken].tolist())
            assert torch.allclose(logits, backbone.prefill(grown, masks)[0], atol=1e-4, rtol=0)


@pytest.mark.parametrize("scorer", [None, *SCORERS])
@pytest.mark.parametrize("number", range(3))
def test_the_cost_is_the_counted_one(backbone, bank, scorer, number):
    encoding = bank.gather([number])
    masks = staged(backbone, encoding, scorer, seed=number + 5)
    cost = backbone.cost(encoding, masks, new_tokens=3)
    ids = torch.tensor([[5]])

    def run() -> None:
        _, kv = backbone.prefill(encoding, masks, cache=True)
        for step in range(2):
            backbone.extend(ids, encoding.next_rope_B + step, kv)

    assert counted(run) == int(cost.llm)
    assert (int(cost.controller) > 0) == (scorer is not None and counted(run) > int(cost.prefill + cost.decode))


def test_a_stage_that_drops_nothing_costs_nothing(small, source):
    encoding = EncodingBank(small, source).gather([0])
    full = small.full(encoding)
    idle = replace(full, stages=(Stage(1, torch.tensor([16]), scorer=AttentionScore()),))
    assert (
        small.cost(encoding, idle).llm
        == small.full_llm_flops(encoding)
        == counted(lambda: small.prefill(encoding, idle))
    )


def test_counts_by_layer():
    stages = (Stage(1, torch.tensor([5, EVERYTHING])), Stage(3, torch.tensor([7, 2])))
    assert token_counts(torch.tensor([8, 8]), stages, 5).tolist() == [[8, 5, 5, 5, 5], [8, 8, 8, 2, 2]]


def test_the_best_are_taken_and_of_equals_the_earlier():
    scores = torch.tensor([[0.5, 0.9, 0.5, -torch.inf, 0.1], [torch.nan, 0.0, 0.0, 0.0, 0.0]])
    among = torch.tensor([[True, False, True, True, True], [True, True, False, True, True]])
    best = best_tokens(scores, among, torch.tensor([2, 2]))
    assert best.int().tolist() == [[1, 0, 1, 0, 0], [0, 1, 0, 1, 0]]
    assert best_tokens(scores, among, torch.tensor([4, EVERYTHING])).equal(among)


def test_projection_carries_stages(small, source):
    encoding = EncodingBank(small, source).gather([0, 3])
    masks = replace(small.full(encoding), stages=(Stage(1, torch.tensor([4, 4]), scorer=AttentionScore()),))
    budgets = torch.full((2,), 0.5, dtype=torch.float64)
    fitted = project(small, masks, torch.rand(2, small.layout.size), budgets, encoding)
    assert len(fitted.stages) == 1
    assert (small.cost(encoding, fitted).llm <= 0.5 * small.full_llm_flops(encoding)).all()
    without = project(small, small.full(encoding), torch.rand(2, small.layout.size), budgets, encoding)
    assert small.layout.flatten(fitted).sum() > small.layout.flatten(without).sum(), "stages do not count as savings"


@dataclass(frozen=True)
class Loudest:
    """A scorer of a user's own: the norm of the hidden state."""

    def score(self, view):
        scores = torch.zeros(view.tokens.ragged.rows, view.tokens.visual + view.tokens.text)
        scores.view(-1)[view.tokens.ids_P] = view.tokens.x_PD.norm(dim=1)
        return scores[:, : view.tokens.visual]

    def flops(self, price):
        return torch.zeros_like(price.entering_B)


def test_a_scorer_of_ones_own(small, source):
    encoding = EncodingBank(small, source).gather([0, 2])
    full, keep = small.full(encoding), torch.tensor([3, 3])
    own = replace(full, stages=(Stage(1, keep, scorer=Loudest()),))
    hidden = []
    layer = small.decoder.model.layers[1].input_layernorm
    handle = layer.register_forward_pre_hook(lambda module, args: hidden.append(args[0]))
    with torch.no_grad():
        small.prefill(encoding, full)
        handle.remove()
        x = hidden[0].unflatten(0, (2, -1))
        start = int(encoding.visual_places_BN[0, 0])
        loud = x[:, start : start + 16].norm(dim=2)
        given = Stage.given(1, best_tokens(loud, torch.ones_like(loud, dtype=torch.bool), keep))
        expected, _ = small.prefill(encoding, replace(full, stages=(given,)))
        assert torch.allclose(small.prefill(encoding, own)[0], expected, atol=1e-5)


def test_what_cannot_be_is_named(small, source):
    encoding = EncodingBank(small, source).gather([0])
    full, keep = small.full(encoding), torch.tensor([3])
    with pytest.raises(InputError, match="a stage stands before layer 3; the layers are 0 to 2"):
        small.prefill(encoding, replace(full, stages=(Stage.given(3, full.tokens),)))
    with pytest.raises(InputError, match="the plan at row 0 attends in no layer before tokens are to be chosen"):
        small.prefill(encoding, replace(full, stages=(Stage(0, keep, scorer=AttentionScore()),)))
