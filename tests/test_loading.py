import json

import pytest
import torch
from transformers import BertConfig, LlamaConfig

from maskgym.backbones import InputError, load_backbone
from maskgym.backbones.backbone import Backbone
from maskgym.backbones.families import FAMILIES
from tests.families import BUILDERS, build_family


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Every family saved as on the hub."""
    place = tmp_path_factory.mktemp("families")
    for name in BUILDERS:
        model, processor = build_family(name)
        model.save_pretrained(place / name)
        if hasattr(processor, "save_pretrained"):
            processor.save_pretrained(place / name)
        else:
            processor.image_processor.save_pretrained(place / name)
            processor.tokenizer.save_pretrained(place / name)
            (place / name / "chat_template.jinja").write_text(processor.chat_template)
    return place


@pytest.mark.parametrize("name", BUILDERS)
def test_every_family_loads_from_a_folder_and_answers_as_before(folders, source, name):
    model, processor = build_family(name)
    built = Backbone(FAMILIES[model.config.model_type](model, processor), name)
    loaded = load_backbone(str(folders / name))
    assert loaded.layout == built.layout
    assert not any(parameter.requires_grad for parameter in loaded.model.parameters())
    queries = [source[number] for number in (0, 3, 4, 7)]
    with torch.no_grad():
        results = []
        for backbone in (built, loaded):
            encoding = backbone.encode(queries)
            results.append(backbone.prefill(encoding, backbone.full(encoding))[0])
    assert torch.allclose(*results, atol=1e-5)


def test_options_reach_the_backbone(folders):
    backbone = load_backbone(
        str(folders / "qwen2_5_vl"), heads=8, width="heads", protected_layers=(0, 2), max_visual_tokens=10
    )
    assert backbone.layout.heads == 8 and backbone.layout.protected_layers == (0, 2)
    assert backbone.layout.tokens == 10 and backbone.decoder.width == "heads"


def test_smaller_limits_make_smaller_images(folders, source):
    small, large = (load_backbone(str(folders / "qwen2_5_vl"), max_visual_tokens=limit) for limit in (10, 24))
    counts = [
        [len(image.visual_nD) for image in backbone.encode_images([source[number].image for number in (2, 4)])]
        for backbone in (small, large)
    ]
    assert max(counts[0]) <= 10 < max(counts[1])


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("huge", {}, "unknown backbone 'huge'; use 'tiny', 'small', a folder, or a hub id"),
        ("/nowhere", {}, "'/nowhere' could not be read"),
        ("llava", {"heads": 3}, "3 head slots do not fit 8 query heads"),
        ("llava", {"width": "depth"}, "width is 'depth'"),
        ("llava", {"protected_layers": (5,)}, r"protected layers \[5\] do not exist"),
        ("llava", {"max_visual_tokens": 4}, "max_visual_tokens is 4, but llava images have up to 16; leave it out"),
        ("qwen2_5_vl", {"max_visual_tokens": 0}, "least image already has 1"),
        ("llava", {"device": "cuda"}, "device cuda is not there"),
        ("llava", {"device": "abacus"}, "device 'abacus' is not one that torch knows"),
        ("llava", {"dtype": "float32"}, "dtype is 'float32'; it must be a torch dtype of floating point"),
    ],
)
def test_bad_requests_are_named(folders, name, options, words):
    where = str(folders / name) if (folders / name).exists() else name
    if options.get("device") == "cuda" and torch.cuda.is_available():
        pytest.skip("there is a CUDA device here")
    with pytest.raises(InputError, match=words):
        load_backbone(where, **options)


@pytest.mark.parametrize("config", [BertConfig(), LlamaConfig()])
def test_other_architectures_are_refused_with_the_supported_ones(tmp_path, config):
    config.save_pretrained(tmp_path)
    with pytest.raises(InputError, match="supported: idefics3, llava, llava_next, qwen2_5_vl, smolvlm"):
        load_backbone(str(tmp_path))


def test_unreadable_configs_and_weights_of_another_model_are_named(tmp_path, folders):
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(InputError, match="could not be read"):
        load_backbone(str(tmp_path))
    mixed = tmp_path / "mixed"
    mixed.mkdir()
    for file in (folders / "llava").iterdir():
        (mixed / file.name).write_bytes(file.read_bytes())
    config = json.loads((mixed / "config.json").read_text())
    config["text_config"]["hidden_size"] = 64
    (mixed / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match="could not be loaded"):
        load_backbone(str(mixed))
    (mixed / "model.safetensors").write_bytes(b"rubbish")
    with pytest.raises(InputError, match="could not be loaded"):
        load_backbone(str(mixed))


def test_tiny_loads_with_plain_transformers():
    from transformers import AutoModelForImageTextToText, AutoProcessor

    from maskgym.backbones.tiny.build import TINY_FOLDER
    from maskgym.envs.data.queries import load_queries

    model = AutoModelForImageTextToText.from_pretrained(TINY_FOLDER).eval()
    processor = AutoProcessor.from_pretrained(TINY_FOLDER)
    query = load_queries("easy-vqa", "test", 5)[2]
    messages = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": query.question}]}]
    text = processor.apply_chat_template(messages, add_generation_prompt=True)
    inputs = processor(images=query.image, text=text, return_tensors="pt")
    generated = model.generate(**inputs, max_new_tokens=4, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    assert processor.decode(generated, skip_special_tokens=True).strip() == query.answers[0]
