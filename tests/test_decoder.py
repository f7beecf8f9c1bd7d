"""Executed plans are exact: against Hugging Face, against masking, across batches, and with a cache."""

import pytest
import torch

from maskgym.backbones import InputError
from maskgym.backbones.engine.blocks import cut_blocks
from maskgym.backbones.engine.decoder import MaskedDecoder
from tests.conftest import random_masks
from tests.masked_reference import masked_logits

ROWS = list(range(8))


def hugging_face_inputs(backbone, query):
    return backbone.family.process([query.image], [backbone.prompt(query.question)])


def test_full_plan_gives_hugging_faces_logits(backbone, bank, source):
    encoding = bank.gather(ROWS)
    with torch.no_grad():
        logits, _ = backbone.prefill(encoding, backbone.full(encoding))
        for row in ROWS:
            expected = backbone.model(**hugging_face_inputs(backbone, source[row])).logits[0, -1]
            assert torch.allclose(logits[row], expected, atol=1e-5, rtol=0)


def test_full_plan_generates_hugging_faces_text(backbone, bank, source):
    ends = backbone.processor.tokenizer.eos_token_id
    expected = []
    for row in ROWS:
        inputs = hugging_face_inputs(backbone, source[row])
        generated = backbone.model.generate(**inputs, max_new_tokens=12, do_sample=False)[0]
        new = generated[inputs["input_ids"].shape[1] :].tolist()
        expected.append(new[: new.index(ends)] if ends in new else new)
    encoding = bank.gather(ROWS)
    answers = backbone.answer(encoding, backbone.full(encoding), max_new_tokens=12)
    assert answers.tokens == expected
    assert max(map(len, expected)) > 3, "the model ends at once, so this would not test the cache"


@pytest.mark.parametrize("keep", [0.3, 0.6, 0.9])
def test_removing_is_masking(backbone, bank, keep):
    encoding = bank.gather([row % 12 for row in range(72)])
    masks = random_masks(backbone, 72, seed=int(10 * keep), keep=keep)
    with torch.no_grad():
        logits, _ = backbone.prefill(encoding, masks)
        for row in range(72):
            assert torch.allclose(logits[row], masked_logits(backbone, encoding, masks, row), atol=1e-4, rtol=0)


def test_a_plan_changes_the_logits(backbone, bank):
    """Null of the tests above: each axis matters to the random model."""
    encoding = bank.gather([0])
    with torch.no_grad():
        full, _ = backbone.prefill(encoding, backbone.layout.full())
        for axis in ("tokens", "heads", "layers"):
            masks = backbone.layout.full()
            getattr(masks, axis)[:, 1:] = False
            assert (backbone.prefill(encoding, masks)[0] - full).abs().max() > 1e-3


def test_mixed_batch_gives_what_its_rows_give_alone(backbone, bank):
    numbers = [row % 12 for row in range(16)]
    masks = random_masks(backbone, 16, seed=5)
    with torch.no_grad():
        together, _ = backbone.prefill(bank.gather(numbers), masks)
        for row, number in enumerate(numbers):
            alone, _ = backbone.prefill(bank.gather([number]), masks[row : row + 1])
            assert torch.allclose(together[row], alone[0], atol=1e-4, rtol=0)


def test_text_only_plans_run(backbone, bank):
    encoding = bank.gather([0, 1])
    masks = backbone.layout.full(2)
    masks.tokens[:] = False
    with torch.no_grad():
        logits, _ = backbone.prefill(encoding, masks)
        assert torch.allclose(logits[1], masked_logits(backbone, encoding, masks, 1), atol=1e-4)


def test_cached_decoding_equals_recomputing(backbone, bank):
    """Teacher-forced tokens through the cache against one prefill of prompt and tokens, under mixed plans."""
    numbers, masks = [0, 1, 2, 3], random_masks(backbone, 4, seed=8)
    encoding = bank.gather(numbers)
    more = torch.randint(4, 12, (4, 5), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        _, kv = backbone.prefill(encoding, masks, cache=True)
        steps = [
            backbone.extend(more[:, :2], encoding.next_rope_B, kv),
            *(backbone.extend(more[:, [step]], encoding.next_rope_B + step, kv) for step in (2, 3, 4)),
        ]
        cached = torch.cat(steps, dim=1)
        questions = [bank.source.text(number)[1] for number in numbers]
        images = backbone.encode_images([bank.source[number].image for number in numbers])
        for taken in range(1, 6):
            grown = backbone.assemble(images, questions, continuations=more[:, :taken].tolist())
            recomputed, _ = backbone.prefill(grown, masks)
            assert torch.allclose(cached[:, taken - 1], recomputed, atol=1e-4, rtol=0)


def test_log_likelihood_is_the_sum_over_the_answers_tokens(backbone, bank):
    encoding, masks = bank.gather([0, 1]), random_masks(backbone, 2, seed=9)
    answers = ["red", "yes no blue"]
    scored = backbone.log_likelihood(encoding, masks, answers)
    images = backbone.encode_images([bank.source[row].image for row in range(2)])
    for row, answer in enumerate(answers):
        ids, total = backbone.answer_ids(answer), 0.0
        for place, token in enumerate(ids):
            question = bank.source.text(row)[1]
            grown = backbone.assemble(images[row : row + 1], [question], continuations=[ids[:place]])
            with torch.no_grad():
                logits, _ = backbone.prefill(grown, masks[row : row + 1])
            total += float(logits.log_softmax(-1)[0, token])
        assert float(scored[row]) == pytest.approx(total, abs=1e-4)


def test_scoring_leaves_generation_alone(backbone, bank):
    encoding, masks = bank.gather([0, 1]), random_masks(backbone, 2, seed=9)
    plain = backbone.answer(encoding, masks, max_new_tokens=4)
    scored = backbone.answer(encoding, masks, max_new_tokens=4, references=["red blue green", "yes"])
    assert plain.tokens == scored.tokens


def test_gradients_reach_the_kept_parts_and_no_other(bank, backbone):
    backbone.model.requires_grad_(True)
    masks = backbone.layout.full(2)
    masks.layers[:, 2] = False
    try:
        backbone.prefill(bank.gather([0, 1]), masks)[0].sum().backward()
        layers = backbone.decoder.model.layers
        assert layers[1].self_attn.q_proj.weight.grad.abs().sum() > 0
        assert layers[2].self_attn.q_proj.weight.grad is None
    finally:
        backbone.model.zero_grad()
        backbone.model.requires_grad_(False)


@pytest.mark.parametrize("slots_per_group", [1, 2])
@pytest.mark.parametrize("rows", [1, 3, 40])
def test_blocks_cover_every_kept_pair_once_and_no_group_twice(rows, slots_per_group):
    heads = torch.rand(rows, 4, generator=torch.Generator().manual_seed(rows)) < 0.5
    pairs, groups = torch.zeros(rows, 4, dtype=torch.long), torch.zeros(rows, 4 // slots_per_group, dtype=torch.long)
    for block in cut_blocks(heads, slots_per_group):
        chosen = torch.arange(rows) if block.rows is None else block.rows
        pairs[chosen[:, None], torch.tensor(block.slots)] += 1
        groups[chosen[:, None], torch.tensor(sorted({slot // slots_per_group for slot in block.slots}))] += 1
    assert torch.equal(pairs, heads.long())
    assert torch.equal(groups, heads.unflatten(1, (-1, slots_per_group)).any(2).long())


def test_slots_and_width_are_checked(small):
    model = small.model
    with pytest.raises(InputError, match="3 head slots do not fit 4 query heads on 4"):
        MaskedDecoder(model.model.language_model, model.lm_head, 3)
    with pytest.raises(InputError, match="width is 'depth'"):
        MaskedDecoder(model.model.language_model, model.lm_head, 4, width="depth")


def test_masks_of_another_layout_are_refused(small, source):
    from maskgym.backbones import MaskLayout

    encoding = small.encode([source[0]])
    with pytest.raises(InputError, match=r"the masks are for \(queries, visual tokens\) \(1, 9\)"):
        small.prefill(encoding, MaskLayout(9, 3, 4).full())


def test_a_question_longer_than_the_context_is_refused(small, source):
    with pytest.raises(InputError, match="shorten the question"):
        small.assemble(small.encode_images([source[0].image]), ["red " * 300])
    with pytest.raises(InputError, match="2 image placeholders"):
        small.assemble(small.encode_images([source[0].image]), ["what is <image> ?"])
