"""Growing ``small``: what plans do, computed densely, is what the engine does; and the phases, on a stand-in."""

import json
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from maskgym.backbones import Backbone, InputError, Masks, load_backbone
from maskgym.backbones.executed import executed_answer_logits
from maskgym.backbones.families.llava import LlavaFamily
from maskgym.backbones.plans.survivors import RESTORED, Survivors
from maskgym.backbones.small.build import build_small
from maskgym.envs.data import scenes_long
from maskgym.envs.data.scenes import PALETTE
from maskgym.training.grow.__main__ import main
from maskgym.training.grow.dense import MATRICES, DenseDecoder
from maskgym.training.grow.lessons import WORDS
from maskgym.training.grow.model import Grown, Vision
from maskgym.training.grow.plans import Pool, choose_tokens, gates_of, lay_out
from maskgym.training.grow.run import Checkpoint, GrowConfig
from maskgym.training.grow.stream import FINE, GRID, PADDING, Pieces, Stream, collate, lesson
from tests.smollm2 import MLP, package_and_cache

QUESTIONS, ROOM = 4, 2000


@pytest.fixture(scope="module")
def package(tmp_path_factory):
    with package_and_cache(tmp_path_factory.mktemp("site")) as file:
        yield file


@pytest.fixture(scope="module")
def planned(package, tmp_path_factory):
    """The folder of a run after its first phase."""
    out = tmp_path_factory.mktemp("run")
    main(["plans", "--out", str(out), "--pool", "128"])
    return out


@pytest.fixture(scope="module")
def built(package):
    return build_small()


@pytest.fixture(scope="module")
def tokenizer(built, tmp_path_factory):
    """The file of the stand-in's tokenizer."""
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    built[1].tokenizer.backend_tokenizer.save(str(path))
    return str(path)


@pytest.fixture(scope="module")
def pieces(tokenizer):
    return Pieces(tokenizer)


@pytest.fixture(scope="module")
def rows():
    """Three scenes, their pictures and questions."""
    rng, asked = np.random.default_rng(1), Counter()
    drawn = [scenes_long.scene(rng) for _ in range(3)]
    return [(image, objects, scenes_long.ask(objects, asked, rng, QUESTIONS)) for objects, image in drawn]


@pytest.fixture(scope="module")
def batch(rows, pieces):
    return collate(rows, pieces, ROOM)


@pytest.fixture(scope="module")
def both(built, pieces):
    """A dense model with deltas, and the engine on the same weights."""
    model, processor = built
    model.config.text_config.max_position_embeddings = 4096
    backbone = Backbone(LlavaFamily(model, processor), "stand-in", heads=9)
    decoder = DenseDecoder(model.model.language_model, rank=3)
    with torch.no_grad():
        for name, path in MATRICES.items():
            decoder.B[name].normal_(0, 0.1)
            deltas = decoder.B[name] @ decoder.A[name]
            for layer, delta in zip(model.model.language_model.layers, deltas, strict=True):
                layer.get_submodule(path).weight += delta
    return Grown(Vision(model), decoder, pieces.before), backbone


@pytest.fixture(scope="module")
def engine(both, rows):
    """The engine's logits under a plan for each image."""
    _, backbone = both
    images = backbone.encode_images([image for image, _, _ in rows])
    own = [(number, question) for number, (_, _, asked) in enumerate(rows) for question in asked]
    answers = [backbone.answer_ids(question.answer) for _, question in own]
    texts = [question.text for _, question in own]
    encoding = backbone.assemble([images[number] for number, _ in own], texts, continuations=answers)
    places = torch.tensor([number for number, _ in own])

    def logits(masks):
        return executed_answer_logits(backbone, encoding, masks[places], answers)

    return logits


def words(logits_TV):
    """Without the last words, which the dense model leaves out to have a multiple of eight."""
    return logits_TV[:, : 8 * (logits_TV.shape[1] // 8)]


@torch.no_grad()
def test_in_full_the_dense_model_says_what_the_engine_says(both, batch, engine):
    grown, backbone = both
    dense_TV = grown.asked(batch, grown.lay_out(batch), grown.full_gates(3), torch.float32)
    torch.testing.assert_close(dense_TV, words(engine(backbone.layout.full(3))), atol=1e-4, rtol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("restored", [False, True])
def test_under_plans_the_dense_model_says_what_the_engine_says(both, batch, engine, restored):
    grown, backbone = both
    generator = torch.Generator().manual_seed(3)
    kept_BN = torch.rand(3, 64, generator=generator) < torch.tensor([[0.5], [0.1], [1.0]])
    heads_BLQ = torch.rand(3, 2, 9, generator=generator) < 0.6
    heads_BLQ[:, 0] = True  # protected
    heads_BLQ[1, 1] = False  # a layer that is dropped
    restored_B = torch.full((3,), restored)
    laid, before = grown.lay_out(batch), len(grown.before)
    answers_BS = F.pad(batch.answers, (before + 64, 0))
    pruned = lay_out(laid, kept_BN, restored_B, answers_BS, before, grown.decoder.rates_R)
    dense_TV = grown.asked(batch, pruned, gates_of(heads_BLQ, MLP), torch.float32)
    survivors = Survivors.plain(3)
    survivors = replace(survivors, positions=RESTORED * restored_B.long(), merged=restored_B)
    masks = Masks(kept_BN, heads_BLQ, heads_BLQ.any(2), survivors=survivors)
    assert not torch.allclose(words(engine(backbone.layout.full(3))), dense_TV, atol=1e-2), "plans change nothing"
    torch.testing.assert_close(dense_TV, words(engine(masks)), atol=1e-4, rtol=1e-4)


def test_what_is_asked_is_what_was_said(batch, rows, pieces):
    decode = pieces._tokenizer.decode
    questions = iter([question for _, _, asked in rows for question in asked])
    for row in range(3):
        for number in range(QUESTIONS):
            question, at = next(questions), batch.owner[row] == number
            told = decode(batch.ids[row][at].tolist(), skip_special_tokens=False)
            assert told == f"{question.text}<|im_end|>\n<|im_start|>assistant\n{question.answer}"
            assert decode(batch.ids[row][at & batch.answers[row]].tolist()) == question.answer
            assert batch.places[row][at].tolist() == list(range(int(at.sum())))
    each = [batch.targets[batch.question == number].tolist() for number in range(3 * QUESTIONS)]
    assert [decode(ids) for ids in each] == [question.answer for _, _, asked in rows for question in asked]
    assert all(ids[-1] == pieces.end for ids in each)
    assert int(batch.asked.sum()) == len(batch.targets)


def test_questions_without_room_are_left_out(rows, pieces):
    longest = max(int((collate([row], pieces, ROOM).owner != PADDING).sum()) for row in rows)
    cut = collate(rows, pieces, longest // 2)
    assert 0 < len(cut.long) < 3 * QUESTIONS
    assert cut.owner.shape[1] == longest // 2


def test_lessons_tell_what_the_picture_shows(rows):
    palette = np.array([PALETTE[color] for color in WORDS[0]])
    looked = 0
    for image, objects, _ in rows:
        pixels = np.asarray(image).reshape(GRID, 16, GRID, 16, 3).swapaxes(1, 2).reshape(64, 256, 3)
        told = lesson(objects)
        for patch in np.flatnonzero(told[:, 5] > 0.6):
            middle = np.median(pixels[patch], axis=0)
            assert np.abs(palette - middle).sum(1).argmin() == told[patch, 0]
            looked += 1
        named = {(round(o.x, 4), round(o.y, 4)): o for o in objects}
        for patch in np.flatnonzero(told[:, 0] >= 0):
            at = (np.array([patch % GRID, patch // GRID]) + 0.5 + told[patch, 3:5]) / GRID
            o = min(named.values(), key=lambda each: abs(each.x - at[0]) + abs(each.y - at[1]))
            assert (WORDS[0][int(told[patch, 0])], WORDS[1][int(told[patch, 1])]) == (o.color, o.shape)
    assert looked > 5 and FINE > 1


def test_plans_of_a_pool_keep_what_they_say():
    generator = torch.Generator().manual_seed(0)
    counts_B = torch.tensor([0, 1, 40, 64])
    kept_BN = choose_tokens(torch.randn(4, 64, 8), counts_B, generator)
    assert kept_BN.sum(1).tolist() == counts_B.tolist()


@pytest.mark.slow
def test_pools_are_ordered_by_budget_and_survive_their_files(planned):
    train = Pool.load(planned / "pools" / "train.npz", 9)
    assert len(train) == 16 * 128 and train.heads_KLQ[:, 0].all(), "the first layer is protected"
    spent_K = train.tokens_K.double() / 64 + train.heads_KLQ.double().mean((1, 2))
    assert spent_K[:512].mean() > spent_K[512:1024].mean() > spent_K[1024:].mean()
    layers = Pool.load(planned / "pools" / "layers.npz", 9)
    assert (layers.tokens_K == 64).all()
    assert (layers.heads_KLQ.all(2) == layers.heads_KLQ.any(2)).all(), "layers go as a whole"


def test_workers_draw_different_scenes_and_the_same_again(tokenizer):
    def first(seed):
        return next(iter(Stream(tokenizer, 2, 0, seed))).pixels

    assert torch.equal(first(1), first(1)) and not torch.equal(first(1), first(2))


def test_a_checkpoint_brings_back_weights_and_what_the_optimiser_keeps(tmp_path):
    given = GrowConfig("language", tmp_path, device="cpu")
    assert Checkpoint.load(given) is None
    model, other = torch.nn.Linear(3, 2), torch.nn.Linear(3, 2)
    optimizer, fresh = (torch.optim.AdamW(each.parameters(), lr=0.1) for each in (model, other))

    def step(each, its):
        its.zero_grad()
        each(torch.arange(6.0).view(2, 3)).square().sum().backward()
        its.step()

    step(model, optimizer)
    Checkpoint.of(7, 1.5, model, optimizer).save(given)
    stored = Checkpoint.load(given)
    stored.restore(other, fresh)
    assert (stored.step, stored.trained) == (7, 1.5) and len(list(tmp_path.iterdir())) == 1
    step(model, optimizer)
    step(other, fresh)
    assert torch.equal(model.weight, other.weight), "the moments are those of before"


@pytest.mark.slow
def test_the_phases_make_a_backbone(planned):
    small = ["--device", "cpu", "--workers", "0", "--images", "2", "--seconds", "1000"]
    main(["tower", "--out", str(planned), *small, "--steps", "2"])
    told = ["language", "--out", str(planned), *small, "--room", "1200", "--rank", "2"]
    main([*told, "--steps", "2", "--plain-share", "0.4", "--ramp-share", "0"])
    lines = [json.loads(line) for line in (planned / "language.jsonl").read_text().splitlines()]
    assert "pruned" not in lines[2] and lines[-1]["ended"] and lines[-1]["step"] == 2
    assert set(lines[-1]) >= {"full", "train", "half", "quarter", "layers"}
    backbone = load_backbone(str(planned / "weights"))
    assert backbone.layout.size == 64 + 2 * 3 + 2

    main([*told, "--steps", "3", "--plain-share", "0"])  # goes on
    lines = [json.loads(line) for line in (planned / "language.jsonl").read_text().splitlines()]
    again = [line.get("step") for line in lines[lines.index(next(x for x in lines if x.get("ended"))) + 1 :]]
    assert max(step for step in again if step) == 3 and 1 not in again
    after = load_backbone(str(planned / "weights"))
    changed = [
        name
        for (name, first), second in zip(backbone.model.named_parameters(), after.model.parameters(), strict=True)
        if not torch.equal(first, second)
    ]
    assert any("vision_tower" in name for name in changed) and any("q_proj" in name for name in changed)
    assert not any("embed_tokens" in name for name in changed), "words stay as published"


@pytest.mark.parametrize(
    "arguments, said",
    [
        (["--images", "0"], r"--images is 0; it must be at least 1"),
        (["--plain-share", "2"], r"--plain-share is 2.0; it must be between 0 and 1"),
        (["--pool", "100"], r"--pool is 100; it must be a multiple of 128"),
        (["--device", "cuda"], r"--device is cuda, which is not there"),
        (["--device", "cpu"], r"has no pools of plans yet; first: python -m maskgym.training.grow plans"),
    ],
)
def test_what_makes_no_sense_is_refused(arguments, said, tmp_path):
    with pytest.raises(InputError, match=said):
        main(["tower", "--out", str(tmp_path), *arguments])
