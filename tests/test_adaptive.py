"""A VLM with a controller in one's own code: what eval run says, in batches, saved, pushed, threaded and streamed."""

import json
import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import bytes_to_unicode

import maskgym.eval.__main__ as eval_main
import maskgym.training.gumbel as train_gumbel
import maskgym.training.rl as train_rl
from maskgym import AdaptiveVLM
from maskgym.backbones import load_backbone
from maskgym.common.errors import InputError
from maskgym.envs import load_queries
from maskgym.eval.policies import load_planner
from maskgym.model_card import model_card
from maskgym.policies.baselines import FullPlanner
from maskgym.policies.wrappers.replies import Planned, Stream
from tests.conftest import build, build_of, command
from tests.local_hub import local_hub

RUNS = {
    "rl": (train_rl, "--envs 8 --rollout-steps 2"),
    "gumbel": (train_gumbel, ""),
    "adallava-h": (train_gumbel, "--estimator adallava-h"),
    "tuned": (train_gumbel, "--tune-backbone lora --tune-rate 0.01"),
}
"""By name the script and its options."""


@pytest.fixture(scope="module")
def run_of(place, tmp_path_factory):
    """Run folders by kind, trained when first asked for."""
    runs = tmp_path_factory.mktemp("runs")

    def train(kind):
        if not (runs / kind).exists():
            script, options = RUNS[kind]
            options += " --budgets 0.6 1 --test-budgets 0.6 --batch-size 8 --total-queries 32"
            where = ["--backbone", place / "vlm", "--data", place / "data", "--out", runs / kind]
            with pytest.MonkeyPatch.context() as patch:
                command(patch, script.main, *where, *options.split())
        return runs / kind

    return train


@pytest.fixture(scope="module")
def vlm(run_of):
    return AdaptiveVLM.from_pretrained(run_of("gumbel"))


@pytest.fixture(scope="module")
def queries(place):
    source = load_queries(str(place / "data"), "test")
    return [source[number] for number in range(12)]


def columns(queries):
    return [query.image for query in queries], [query.question for query in queries]


@pytest.mark.parametrize("kind", RUNS)
@pytest.mark.slow
def test_answers_and_costs_are_those_of_eval_run(monkeypatch, run_of, queries, place, tmp_path, kind):
    """``eval run`` plans and answers all twelve in one batch; here they come in two."""
    options = ["--budgets", "0.6", "--json", tmp_path / "r.json", "--data", place / "data"]
    command(monkeypatch, eval_main.main, "run", run_of(kind), *options)
    (record,) = json.loads((tmp_path / "r.json").read_text())
    vlm = AdaptiveVLM.from_pretrained(run_of(kind))
    replies = [
        reply
        for part in (queries[:5], queries[5:])
        for reply in vlm.generate(*columns(part), budget=0.6, max_new_tokens=1)
    ]
    right = [reply.text in query.answers for reply, query in zip(replies, queries, strict=True)]
    assert sum(right) / 12 == pytest.approx(record["accuracy"])
    for name in ("llm_flops_ratio", "kept_tokens", "kept_heads", "kept_layers"):
        assert sum(getattr(reply, name) for reply in replies) / 12 == pytest.approx(record[name]), name
    assert all(reply.llm_flops_ratio <= 0.6 and reply.total_flops > reply.llm_flops for reply in replies)
    backbone = vlm.backbone
    encoding = backbone.encode(queries)
    masks = load_planner(str(run_of(kind)), backbone, 0).plan(encoding, torch.full((12,), 0.6, dtype=torch.float64))
    answers = backbone.answer(encoding, masks)
    assert [reply.text for reply in replies] == answers.texts
    assert all(
        torch.equal(reply.plan.heads[0], heads) for reply, heads in zip(replies, answers.masks.heads, strict=True)
    )


@pytest.mark.parametrize("kind", RUNS)
@pytest.mark.slow
def test_mixed_budgets_in_a_batch_are_singles(run_of, queries, kind):
    vlm = AdaptiveVLM.from_pretrained(run_of(kind))
    budgets = [0.6 + 0.03 * row for row in range(12)]
    together = vlm.generate(*columns(queries), budgets, max_new_tokens=5)
    for query, budget, reply in zip(queries, budgets, together, strict=True):
        alone = vlm.generate(query.image, query.question, budget, max_new_tokens=5)
        assert (alone.text, alone.figures()) == (reply.text, reply.figures()) and reply.budget == budget
        assert (alone.plan.tokens == reply.plan.tokens).all() and (alone.plan.layers == reply.plan.layers).all()
    assert len({reply.llm_flops for reply in together}) > 6


@pytest.mark.slow
def test_longer_answers_are_spent_on_and_not_planned_for(vlm, queries):
    one, five = (vlm.generate(queries[0].image, queries[0].question, 0.7, max_new_tokens=n) for n in (1, 5))
    assert one.llm_flops == one.spent_llm_flops == five.llm_flops < five.spent_llm_flops
    assert five.text.startswith(one.text) and five.text != one.text


@pytest.mark.parametrize("kind", ["gumbel", "adallava-h"])
@pytest.mark.slow
def test_pieces_add_up(run_of, queries, kind):
    vlm = AdaptiveVLM.from_pretrained(run_of(kind))
    for query in queries[6:8]:
        whole = vlm.generate(query.image, query.question, 0.9, max_new_tokens=6)
        stream = vlm.generate(query.image, query.question, 0.9, max_new_tokens=6, stream=True)
        first = next(stream)
        assert stream.reply is None and len(first) < len(whole.text)
        assert torch.is_grad_enabled(), "the caller's gradients are off between two pieces"
        assert first + "".join(stream) == whole.text
        assert stream.reply.figures() == whole.figures()


@pytest.mark.slow
def test_unfinished_characters_are_held_back(source):
    """Tokens are single bytes, odd ones the first of two that make a character, even ones the second."""
    backbone = build(seed=1)
    backbone.model.generation_config.eos_token_id = None
    planned = [Planned.of(FullPlanner(backbone), backbone, [source[number]], [1.0]) for number in range(12)]
    letter = bytes_to_unicode()
    size = backbone.model.config.text_config.vocab_size
    vocabulary = {letter[(0xC3 if number % 2 else 0xA0) + number // 2]: number for number in range(size)}
    bytewise = Tokenizer(models.WordLevel(vocabulary, unk_token=letter[0xA0]))
    bytewise.decoder = decoders.ByteLevel()
    backbone.processor = SimpleNamespace(tokenizer=PreTrainedTokenizerFast(tokenizer_object=bytewise))
    whole = 0
    for each in planned:
        (reply,), pieces = each.answer(12), list(Stream(each, 12))
        assert "".join(pieces) == reply.text
        whole += sum(character != "\ufffd" for character in reply.text)
    assert whole > 3, "no character was ever finished, so nothing had to be held back"


@pytest.mark.parametrize("kind", ["rl", "adallava-h"])
@pytest.mark.slow
def test_eight_threads_get_what_they_would_get_alone(run_of, queries, kind):
    vlm = AdaptiveVLM.from_pretrained(run_of(kind))

    def ask(number):
        query = queries[number % 12]  # every question is new to the tokenizer
        return vlm.generate(query.image, f"{query.question} {number}", 0.6 + 0.1 * (number % 5), max_new_tokens=3)

    with ThreadPoolExecutor(8) as pool:
        together = list(pool.map(ask, range(32)))
    alone = [ask(number) for number in range(32)]
    assert [(a.text, a.figures()) for a in alone] == [(b.text, b.figures()) for b in together]


IN_A_NEW_PROCESS = """
import json, sys
from maskgym import AdaptiveVLM
assert "matplotlib.pyplot" not in sys.modules, "importing maskgym chooses the user's plotting backend"
image, question, *places = sys.argv[1:]
def ask(vlm):
    reply = vlm.generate(image, question, 0.8, max_new_tokens=5)
    return [reply.text, reply.figures()]
said = {place: ask(AdaptiveVLM.from_pretrained(place)) for place in places}
url = AdaptiveVLM.from_pretrained(places[0]).push_to_hub("me/mine", private=True)
said |= {"url": url, "fetched": ask(AdaptiveVLM.from_pretrained("me/mine"))}
try:
    AdaptiveVLM.from_pretrained("me/other")
except Exception as error:
    said["other"] = [type(error).__name__, str(error)]
print(json.dumps(said))
"""


@pytest.mark.slow
def test_saved_pushed_and_loaded_in_a_new_process_it_says_the_same(run_of, queries, tmp_path):
    query = queries[0]
    query.image.save(tmp_path / "image.png")
    expected = {}
    for kind in ("gumbel", "adallava-h", "tuned"):
        vlm = AdaptiveVLM.from_pretrained(run_of(kind))
        vlm.save_pretrained(tmp_path / kind)
        reply = vlm.generate(query.image, query.question, 0.8, max_new_tokens=5)
        expected[str(tmp_path / kind)] = [reply.text, reply.figures()]
    with local_hub() as hub:
        address = f"http://127.0.0.1:{hub.server_port}"
        done = subprocess.run(
            [sys.executable, "-c", IN_A_NEW_PROCESS, tmp_path / "image.png", query.question, *expected],
            env={**os.environ, "HF_ENDPOINT": address, "HF_HOME": str(tmp_path / "home"), "HF_TOKEN": "hf_x"}
            | {"PYTHONPATH": str(Path(__file__).parent.parent), "NO_PROXY": "127.0.0.1", "HF_HUB_DISABLE_XET": "1"},
            capture_output=True,
            text=True,
        )
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout.splitlines()[-1])
    assert {place: said[place] for place in expected} == expected
    assert said["fetched"] == said[str(tmp_path / "gumbel")]
    assert said["url"] == f"{address}/me/mine" and hub.created["visibility"] == "private"
    saved = tmp_path / "gumbel"
    files = {str(path.relative_to(saved)) for path in saved.rglob("*") if path.is_file()}
    assert set(hub.files["me/mine"]) == files
    assert {"README.md", "adaptive.json", "controller.json", "controller.safetensors"} < files
    card = hub.files["me/mine"]["README.md"].decode()
    assert 'from_pretrained("me/mine")' in card and "| gumbel " in card and "the VLM in `model/`" in card
    kind, message = said["other"]
    assert kind == "InputError" and "run `hf download me/other --local-dir FOLDER` elsewhere" in message


def test_without_network_a_hub_id_says_what_to_put_where(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    words = r"'me/mine' is no folder here, .*; without network here, run `hf download me/mine --local-dir FOLDER`"
    with pytest.raises(InputError, match=words):
        AdaptiveVLM.from_pretrained("me/mine")


@pytest.mark.slow
def test_options_of_the_backbone_and_its_name_are_saved(place, run_of, tmp_path):
    """A backbone that is known by name is not copied; the options that it had are asked of it again."""
    backbone = load_backbone(str(place / "vlm"), expected_answer_tokens=4)
    AdaptiveVLM.from_pretrained(run_of("gumbel"), backbone).save_pretrained(tmp_path / "saved", with_backbone=False)
    assert not (tmp_path / "saved" / "model").exists()
    with pytest.raises(InputError, match="is neither within it nor on the hub; if you trust that place, name it"):
        AdaptiveVLM.from_pretrained(tmp_path / "saved")
    loaded = AdaptiveVLM.from_pretrained(tmp_path / "saved", str(place / "vlm")).backbone
    assert (loaded.name, loaded.expected_answer_tokens) == (str(place / "vlm"), 4)
    card = (tmp_path / "saved" / "README.md").read_text()
    assert f"the VLM `{place / 'vlm'}`" in card and "base_model" not in card
    backbone.name = "owner/model"
    assert "\nbase_model: owner/model\n" in model_card("me/mine", backbone, False, ())


@pytest.mark.slow
def test_a_controller_for_other_weights_is_refused(place, run_of, tmp_path):
    """Of the same layout; a controller saved before fingerprints were is taken as it is."""
    other = build(seed=1)
    other.model.save_pretrained(tmp_path / "other")
    other.processor.save_pretrained(tmp_path / "other")
    for run, backbone in (("gumbel", tmp_path / "other"), ("tuned", place / "vlm")):
        with pytest.raises(InputError, match="was trained for other weights"):
            AdaptiveVLM.from_pretrained(run_of(run), str(backbone))
    with pytest.raises(InputError, match=r"is for \(tokens, layers, heads, hidden\) = .*; backbone 'llava' has"):
        AdaptiveVLM.from_pretrained(run_of("gumbel"), build_of("llava"))
    copy = shutil.copytree(run_of("gumbel"), tmp_path / "old")
    sizes = json.loads((copy / "controller.json").read_text())
    del sizes["backbone_fingerprint"]
    (copy / "controller.json").write_text(json.dumps(sizes))
    assert AdaptiveVLM.from_pretrained(copy, str(tmp_path / "other")).backbone.name == str(tmp_path / "other")


@pytest.mark.slow
def test_milliseconds(monkeypatch, run_of, queries, place, tmp_path):
    where = ["--backbone", place / "vlm", "--data", place / "data", "--out", tmp_path / "latency.json"]
    command(monkeypatch, eval_main.main, "latency", "full", *where, "--queries", 2, "--repeats", 1)
    vlm = AdaptiveVLM.from_pretrained(run_of("gumbel"), latency_model=tmp_path / "latency.json")
    query = queries[0]
    slow = vlm.generate(query.image, query.question, latency_ms=1e6)
    assert slow.budget == 1 and 0 < slow.predicted_ms < 1e6
    limit = 0.9 * slow.predicted_ms
    fast = vlm.generate([query.image] * 2, [query.question] * 2, latency_ms=limit)
    assert all(reply.predicted_ms <= limit and reply.budget < 1 for reply in fast)
    assert vlm.generate(query.image, query.question, 1.0).predicted_ms == pytest.approx(slow.predicted_ms)
    other = AdaptiveVLM.from_pretrained(run_of("tuned"))
    with pytest.raises(InputError, match="is of backbone"):
        AdaptiveVLM.from_pretrained(run_of("tuned"), latency_model=tmp_path / "latency.json")
    with pytest.raises(
        InputError, match=f"make one with python -m maskgym.eval latency --backbone {other.backbone.name} "
    ):
        other.generate(query.image, query.question, latency_ms=5.0)


def test_calls_like_those_of_a_pipeline(vlm, queries, tmp_path):
    images, texts = columns(queries[:3])
    replies = vlm.generate(images, texts, [0.6, 0.7, 0.8], max_new_tokens=4)
    options = {"budget": [0.6, 0.7, 0.8], "max_new_tokens": 4}
    expected = [
        {"input_text": text, "generated_text": reply.text, **reply.figures()}
        for text, reply in zip(texts, replies, strict=True)
    ]
    assert vlm(images=images, text=texts, **options) == expected
    rows = [{"image": image, "text": text} for image, text in zip(images, texts, strict=True)]
    assert vlm(rows, **options) == expected
    images[0].save(tmp_path / "image.png")
    assert vlm(str(tmp_path / "image.png"), text=texts[0], budget=0.6, max_new_tokens=4) == expected[:1]
    assert vlm(rows[1], budget=0.7, max_new_tokens=4) == expected[1:2]
    assert {"budget", "llm_flops_ratio", "llm_flops", "kept_tokens", "kept_heads", "kept_layers"} < expected[0].keys()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"budget": 0.0}, "budget 0 is outside"),
        ({"budget": 1.5}, "budget 1.5 is outside"),
        ({"budget": float("nan")}, "budget nan is outside"),
        ({"budget": [0.5, 0.6]}, "2 budgets were given for 1 questions"),
        ({"budget": 0.01}, "the least budget here is"),
        ({"budget": 0.5, "latency_ms": 3.0}, "budget 0.5 and latency_ms 3 stand for each other"),
        ({"latency_ms": 3.0}, "latency_ms needs a latency model"),
        ({"max_new_tokens": 0}, "max_new_tokens is 0; it must be at least 1"),
        ({"questions": []}, "1 images and 0 questions"),
        ({"questions": "<image> twice"}, "image placeholders"),
        ({"questions": ["a", "b"], "stream": True}, "stream=True is for one question; 2 were given"),
        ({"images": None}, "has no image"),
        ({"images": "nowhere.png"}, "image 'nowhere.png' does not exist"),
        ({"images": __file__}, "cannot be decoded"),
    ],
)
def test_bad_calls_are_named(vlm, queries, arguments, words):
    given = {"images": queries[0].image, "questions": queries[0].question, **arguments}
    with pytest.raises(InputError, match=words):
        vlm.generate(**given)


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ([{"image": None, "question": "?"}], "input 0 is the keys image, question; give"),
        (["image.png"], "input 0 is a str; give images and text"),
        (None, "0 images and 0 questions"),
    ],
)
def test_bad_rows_are_named(vlm, rows, words):
    with pytest.raises(InputError, match=words):
        vlm(rows)


def test_places_without_a_controller_are_named(tmp_path):
    with pytest.raises(InputError, match=r"is neither a run folder .* nor what save_pretrained wrote"):
        AdaptiveVLM.from_pretrained(tmp_path)
    (tmp_path / "adaptive.json").write_text("[]")
    with pytest.raises(InputError, match=r"adaptive\.json' is not readable"):
        AdaptiveVLM.from_pretrained(tmp_path)
    (tmp_path / "adaptive.json").write_text(json.dumps({"backbone": "tiny", "backbone_options": {}}))
    with pytest.raises(InputError, match="no readable controller in"):
        AdaptiveVLM.from_pretrained(tmp_path)
