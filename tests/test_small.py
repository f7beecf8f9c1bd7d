"""The embedded VLM on SmolLM2, with a stand-in for the published language model."""

import copy
import shutil
from collections import namedtuple
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from maskgym.backbones import Backbone, InputError, load_backbone
from maskgym.backbones.families.llava import LlavaFamily
from maskgym.backbones.query_encoder import QueryEncoder
from maskgym.backbones.small import cache as small_cache
from maskgym.backbones.small import smollm2
from maskgym.backbones.small.build import build_small
from maskgym.backbones.small.deltas import apply_deltas, delta_files
from tests.smollm2 import LAYERS, asked, package_and_cache, projection, random_deltas, write_deltas

KINDS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@pytest.fixture(scope="module")
def package(tmp_path_factory):
    """A stand-in for the published file, and a cache."""
    with package_and_cache(tmp_path_factory.mktemp("site")) as file:
        yield file


@pytest.fixture(scope="module")
def plain(package):
    """The model without deltas."""
    return build_small()[0]


@pytest.fixture(scope="module")
def shipped(plain, tmp_path_factory):
    """A folder of deltas that no test changes."""
    return write_deltas(tmp_path_factory.mktemp("deltas"), random_deltas(plain))


@pytest.fixture(scope="module")
def loaded(shipped):
    return load_backbone(str(shipped))


@pytest.fixture
def deltas(shipped, tmp_path, monkeypatch):
    """A copy of that folder, and an empty cache."""
    monkeypatch.setenv("MASKGYM_CACHE", str(tmp_path / "cache"))
    return Path(shutil.copytree(shipped, tmp_path / "deltas"))


def test_the_language_model_is_the_published_one(package):
    model, processor = build_small()
    published = smollm2.load_language_model(package)
    words = model.model.language_model.embed_tokens.weight
    assert model.lm_head.weight is words, "tied, as published"
    assert torch.equal(words[:-1], published.model.embed_tokens.weight) and not words[-1].any()
    for name, weight in published.model.layers.state_dict().items():
        assert torch.equal(model.model.language_model.layers.state_dict()[name], weight), name
    assert model.config.image_token_id == len(words) - 1 == processor.tokenizer.convert_tokens_to_ids("<image>")
    assert "gguf" not in model.config.to_json_string()


def test_towers_differ_by_seed_alone(package):
    first, again, other = (build_small(seed)[0].model.vision_tower.state_dict() for seed in (1, 1, 2))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["embeddings.patch_embedding.weight"], other["embeddings.patch_embedding.weight"])


def test_deltas_change_the_weights_that_they_name(plain, loaded):
    tensors, decoder = random_deltas(plain), loaded.model.model.language_model
    assert torch.equal(decoder.embed_tokens.weight, plain.model.language_model.embed_tokens.weight)
    for number, (layer, before) in enumerate(zip(decoder.layers, plain.model.language_model.layers, strict=True)):
        for kind in KINDS:
            a, b = (tensors[f"lora.{kind}.{part}"][number].float() for part in "AB")
            assert torch.allclose(projection(layer, kind).weight, projection(before, kind).weight + b @ a, atol=1e-6)
        assert torch.equal(layer.input_layernorm.weight, tensors["norm.input"][number].float())
        assert torch.equal(layer.post_attention_layernorm.weight, tensors["norm.post"][number].float())
    assert torch.equal(decoder.norm.weight, tensors["norm.final"].float())
    weights = loaded.model.state_dict()
    for name in (name for name in tensors if name.startswith("model.")):
        assert torch.equal(weights[name], tensors[name].float()), name


@pytest.mark.parametrize("heads", [3, 9])
def test_the_engine_answers_as_transformers_does(loaded, heads):
    backbone = Backbone(loaded.family, "small", heads=None if heads == 3 else heads)
    assert backbone.layout.heads == heads and backbone.layout.tokens == 64
    queries = asked(3)
    encoding = backbone.encode(queries)
    logits, _ = backbone.prefill(encoding, backbone.full(encoding))
    for row, query in enumerate(queries):
        inputs = backbone.processor(images=query.image, text=backbone.prompt(query.question), return_tensors="pt")
        assert torch.allclose(logits[row], backbone.model(**inputs).logits[0, -1], atol=1e-4, rtol=1e-5)


SAID = "<|im_start|>{{ message['role'] }}:{% for part in message['content'] %}"
SAID += "{% if part['type'] == 'image' %}<image>{% else %}SPACE{{ part['text'] }}{% endif %}{% endfor %}<|im_end|>"
TEMPLATE = "{% for message in messages %}" + SAID + "{% endfor %}{% if add_generation_prompt %}OPEN{% endif %}"


@pytest.mark.parametrize(
    ("opening", "space", "answer", "text"),
    [
        ("<|im_start|>assistant:", " ", "red", " red"),
        ("<|im_start|>assistant:", "", "red", "red"),
        ("<|im_start|>assistant: ", " ", "red", "red"),  # the space is the prompt's, and no part of a word
        ("<|im_start|>assistant:", " ", "red\nblue 12", " red\nblue 12"),
        ("<|im_start|>assistant:", " ", "", ""),
        ("<|im_start|>assistant: gre", "{{ raise_exception('no answers') }}", "en", "en"),  # "green" is one token
    ],
)
def test_the_ids_of_an_answer_continue_those_of_the_prompt(loaded, opening, space, answer, text):
    processor = copy.copy(loaded.processor)
    space = "{% if message['role'] == 'assistant' %}" + space + "{% endif %}"
    processor.chat_template = TEMPLATE.replace("OPEN", opening).replace("SPACE", space)
    encoder = QueryEncoder(LlavaFamily(loaded.model, processor), loaded.layout)
    assert encoder.prompt("what?").endswith(opening)
    expected = processor.tokenizer(text, add_special_tokens=False)["input_ids"]
    assert encoder.answer_ids(answer) == expected
    assert encoder.answer_lengths([answer, answer]) == [len(expected)] * 2


def test_what_was_made_once_is_loaded_without_the_package(shipped, loaded, monkeypatch):
    monkeypatch.setattr(smollm2, "find_spec", lambda _: None)
    again = load_backbone(str(shipped))
    assert all(map(torch.equal, loaded.model.state_dict().values(), again.model.state_dict().values()))
    assert again.prompt_ids("what 12?") == loaded.prompt_ids("what 12?")


def test_other_deltas_make_another_model(shipped, loaded, deltas, monkeypatch):
    monkeypatch.setenv("MASKGYM_CACHE", str(small_cache.converted(shipped, "first").parents[2]))
    tensors = random_deltas(loaded.model)
    tensors["norm.final"] += 1
    other = load_backbone(str(write_deltas(deltas, tensors)))
    assert torch.equal(other.model.model.language_model.norm.weight, tensors["norm.final"].float())


def test_one_makes_it_where_several_want_it(deltas, monkeypatch):
    made = []
    load = smollm2.load_language_model
    monkeypatch.setattr(smollm2, "load_language_model", lambda path: made.append(path) or load(path))
    with ThreadPoolExecutor(2) as pool:
        folders = list(pool.map(lambda _: small_cache.converted(deltas, "both"), range(2)))
    assert len(made) == 1 and folders[0] == folders[1] and (folders[0] / "model.safetensors").is_file()


def test_what_ended_half_way_is_made_anew(deltas, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(small_cache, "apply_deltas", full)
        with pytest.raises(InputError, match=r"cannot be written \(No space left"):
            load_backbone(str(deltas))
    assert load_backbone(str(deltas)).layout.layers == LAYERS


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({"MASKGYM_CACHE": "/a/b"}, "/a/b"),
        ({"MASKGYM_CACHE": "/a/b", "XDG_CACHE_HOME": "/x"}, "/a/b"),
        ({"XDG_CACHE_HOME": "/x"}, "/x/maskgym"),
        ({"XDG_CACHE_HOME": "not/absolute"}, "/home/me/.cache/maskgym"),
        ({}, "/home/me/.cache/maskgym"),
    ],
)
def test_where_the_cache_is(monkeypatch, variables, expected):
    for name in ("MASKGYM_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in {"HOME": "/home/me", **variables}.items():
        monkeypatch.setenv(name, value)
    assert str(small_cache.cache_home()) == expected


def without(name):
    return lambda tensors: tensors.pop(name)


def put(name, value):
    return lambda tensors: tensors.update({name: value})


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (without("norm.post"), "no tensor 'norm.post'"),
        (without("lora.q_proj.A"), "no tensor 'lora.q_proj.A'"),
        (without("model.multi_modal_projector.linear_1.bias"), "no tensor 'model.multi_modal_projector.linear_1.bias'"),
        (put("lora.x.A", torch.zeros(2)), "a tensor 'lora.x.A', which the model does not have"),
        (put("norm.input", torch.zeros(3, 36)), r"'norm.input' of shape \(3, 36\), not \(2, 36\)"),
        (put("lora.v_proj.B", torch.zeros(2, 12, 3)), r"'lora.v_proj.B' of shape \(2, 12, 3\), not \(2, 12, 2\)"),
        (put("lora.q_proj.A", torch.zeros(())), r"'lora.q_proj.A' of shape \(\), not \(2, 1, 36\)"),
        (put("norm.final", torch.zeros(36).long()), "'norm.final' with values that are no finite"),
        (put("norm.final", torch.full((36,), torch.nan)), "'norm.final' with values that are no finite"),
    ],
)
def test_deltas_of_another_model_are_refused(plain, tmp_path, spoil, words):
    tensors, before = random_deltas(plain), [weight.clone() for weight in plain.state_dict().values()]
    spoil(tensors)
    with pytest.raises(InputError, match=words):
        apply_deltas(plain, delta_files(write_deltas(tmp_path, tensors), "other"), "other")
    assert all(map(torch.equal, before, plain.state_dict().values())), "changed in part"


def spoilt_text(text):
    return lambda folder: (folder / "deltas.json").write_text(text)


def link_out(folder):
    (folder / "part-0.safetensors").rename(folder.parent / "elsewhere.safetensors")
    (folder / "part-0.safetensors").symlink_to(folder.parent / "elsewhere.safetensors")


def remove_weights(folder):
    for file in folder.glob("*.safetensors"):
        file.unlink()


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (spoilt_text("{"), "unreadable deltas.json"),
        (spoilt_text("[]"), "unreadable deltas.json"),
        (spoilt_text('{"base": "gpt2"}'), "deltas of 'gpt2'; only those of 'smollm2'"),
        (remove_weights, "has no weights yet"),
        (link_out, "is a link out of its folder"),
        (
            lambda folder: (folder / "part-1.safetensors").write_bytes(b"rubbish"),
            "part-1.safetensors could not be read",
        ),
        (
            lambda folder: shutil.copy(folder / "part-1.safetensors", folder / "part-2.safetensors"),
            "twice, also in",
        ),
        (lambda folder: (folder / "part-2.safetensors").mkdir(), "part-2.safetensors is no regular file"),
    ],
)
def test_folders_that_hold_no_deltas_are_named(plain, deltas, spoil, words):
    spoil(deltas)
    with pytest.raises(InputError, match=words) as caught:
        apply_deltas(plain, delta_files(deltas, "other"), "other")
    assert "\n" not in str(caught.value)


def test_nothing_is_kept_of_what_is_refused(deltas):
    (deltas / "part-1.safetensors").write_bytes(b"rubbish")
    for _ in range(2):
        with pytest.raises(InputError, match=r"part-1\.safetensors could not be read"):
            load_backbone(str(deltas))


Usage = namedtuple("Usage", "total used free")


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda monkeypatch, _: monkeypatch.setattr(smollm2, "find_spec", lambda _: None), "pip install"),
        (lambda _, file: file.unlink(), "No such file or directory.*pip install"),
        (lambda _, file: file.write_bytes(b"GGUF"), "is not the file that 'small' was trained on"),
        (
            lambda monkeypatch, _: monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(2**40, 2**40, 2**25)),
            "needs 600 MB of disk, 32 MB are free; .*MASKGYM_CACHE",
        ),
        (lambda monkeypatch, file: monkeypatch.setenv("MASKGYM_CACHE", str(file / "in")), "cannot be written"),
    ],
)
def test_what_is_missing_is_said_in_one_line(package, deltas, tmp_path, monkeypatch, spoil, words):
    site = Path(shutil.copytree(package.parents[1], tmp_path / "site"))
    monkeypatch.syspath_prepend(site)
    spoil(monkeypatch, site / package.relative_to(package.parents[1]))
    with pytest.raises(InputError, match=words) as caught:
        load_backbone(str(deltas))
    assert "\n" not in str(caught.value)


def test_adapters_on_it_are_merged_into_it(loaded, shipped, tmp_path):
    from peft import get_peft_model

    from maskgym.policies.adapters import lora_config, save_model

    adapted = get_peft_model(load_backbone(str(shipped)).model, lora_config(loaded, 2))
    for name, weight in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight)
    save_model(adapted, loaded, tmp_path / "adapters")
    again = load_backbone(str(tmp_path / "adapters"))
    before, after = (each.model.model.language_model.layers[1].self_attn.o_proj.weight for each in (loaded, again))
    assert not torch.equal(before, after)
    assert torch.equal(loaded.model.lm_head.weight, again.model.lm_head.weight)
