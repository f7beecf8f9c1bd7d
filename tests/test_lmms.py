"""The plug-in for lmms-eval: its requests answered under several budgets, in order, and what is refused.

Requests are small objects with the fields of the harness's; tests/test_lmms_harness.py has its own.
"""

import ast
import json
import tomllib
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from maskgym import AdaptiveVLM
from maskgym.common.errors import InputError
from maskgym.envs.data.side_by_side import side_by_side
from maskgym.lmms.arguments import Arguments
from maskgym.lmms.requests import Request
from maskgym.lmms.throughput import throughput
from maskgym.policies.controller.network import ControllerConfig, TwoLevelController
from tests.conftest import build, make_dataset

ROOT = Path(__file__).parent.parent
ROWS = make_dataset(12)
OPTIONS = {"max_new_tokens": 5, "temperature": 0, "do_sample": False, "until": ["ASSISTANT:"]}


@dataclass
class HarnessRequest:
    args: tuple
    metadata: dict = field(default_factory=dict)


def visual(doc):
    return [doc["image"]]


def generation(doc_id, options=OPTIONS, doc_to_visual=visual, context=None, **metadata):
    context = ROWS[doc_id]["question"] if context is None else context
    return HarnessRequest((context, dict(options), doc_to_visual, doc_id, "made", "test"), metadata)


def scoring(doc_id, continuation, doc_to_visual=visual):
    return HarnessRequest((ROWS[doc_id]["question"], continuation, doc_to_visual, doc_id, "made", "test"))


DOCUMENTS = {"made": {"test": ROWS}}


def to_generate(*requests):
    return [Request.to_generate(request, DOCUMENTS) for request in requests]


def to_score(*requests):
    return [Request.to_score(request, DOCUMENTS) for request in requests]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A saved controller of its own VLM; what an untrained one plans still differs by budget."""
    folder = tmp_path_factory.mktemp("lmms") / "run"
    backbone = build()
    torch.manual_seed(0)
    controller = TwoLevelController(ControllerConfig.for_layout(backbone.layout, backbone.hidden, width=8))
    AdaptiveVLM(controller, backbone, "made").save_pretrained(folder, with_backbone=True)
    return folder


@pytest.fixture(scope="module")
def vlm(run):
    return AdaptiveVLM.from_pretrained(run)


def opened(run, **options):
    return Arguments.read({"pretrained": str(run), "device": "cpu", **options}).open()


def test_the_entry_point_is_declared_and_there():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    module, name = project["project"]["entry-points"]["lmms_eval.models"]["maskgym"].split(":")
    tree = ast.parse((ROOT / module.replace(".", "/")).with_suffix(".py").read_text())
    assert name in [node.name for node in tree.body if isinstance(node, ast.FunctionDef)]
    assert "maskgym.lmms" in project["tool"]["setuptools"]["packages"]


@pytest.mark.parametrize(
    ("given", "budgets"), [(0.5, (0.5,)), (1, (1.0,)), ("0.25-0.5-1.0", (0.25, 0.5, 1.0)), ("0.7", (0.7,))]
)
def test_budgets_as_the_harness_reads_them(given, budgets):
    assert Arguments.read({"pretrained": "x", "budget": given, "records": "r"}).budgets == budgets


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "either pretrained=RUN .* or answers=FILE"),
        ({"pretrained": "x", "answers": "y"}, "either pretrained=RUN"),
        ({"pretrained": "x", "bugdet": 0.5}, "unknown option 'bugdet'; known: pretrained, answers, budget"),
        ({"pretrained": "x", "budget": "half"}, "budget=half is no share"),
        ({"pretrained": "x", "budget": "0.5-"}, "budget=0.5- is no share"),
        ({"pretrained": "x", "budget": 1.5}, r"budget 1.5 is outside \(0, 1\]"),
        ({"pretrained": "x", "budget": "0.5-1.0"}, "budget=0.5-1.0 are several.* add records=FILE"),
        ({"answers": "x", "budget": "0.5-1.0"}, "one budget can be scored at a time"),
        ({"pretrained": "x", "dtype": "int8"}, "dtype=int8 is not supported; give one of float32, bfloat16"),
        ({"answers": "x", "records": "r"}, "records=r has no use with answers="),
    ],
)
def test_model_args_without_sense(options, message):
    with pytest.raises(InputError, match=message):
        Arguments.read(options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": "auto"}, "batch_size 'auto' is not supported"),
        ({"batch_size": 0}, "batch_size '0' is not supported"),
        ({"pretrained": "/nowhere"}, "neither a run folder"),
        ({"backbone": "tiny"}, "the controller in .* is for"),
    ],
)
def test_what_cannot_be_opened(run, options, message):
    with pytest.raises(InputError, match=message):
        opened(run, **options)


@pytest.mark.slow
def test_answers_and_figures_are_those_of_the_vlm_in_the_order_asked(run, vlm):
    """Requests of two lengths alternate, so that batches are not in the order asked; figures are equal to singles'."""
    lengths = [5, 2] * 6
    requests = to_generate(*(generation(row, {**OPTIONS, "max_new_tokens": n}) for row, n in enumerate(lengths)))
    records = opened(run, budget="0.6-1.0", records=run.parent / "unused", batch_size="4").records(requests)
    for row, (own, length) in enumerate(zip(records, lengths, strict=True)):
        assert [record["doc_id"] for record in own] == [row, row]
        for record, budget in zip(own, (0.6, 1.0), strict=True):
            reply = vlm.generate(ROWS[row]["image"], ROWS[row]["question"], budget, max_new_tokens=length)
            figures = {name: value for name, value in reply.figures().items() if value is not None}
            assert record["answer"] == reply.text and {name: record[name] for name in figures} == figures
            assert record["llm_flops_ratio"] <= budget == record["budget"] and record["new_tokens"] == length
            assert record["encode_ms"] > 0 and record["answer_ms"] > 0 and record["batch"] in (4, 2)
        assert own[0]["llm_flops"] < own[1]["llm_flops"]
    assert len({record["answer"] for own in records for record in own}) > 3


def test_images_are_encoded_once_for_all_budgets_and_fetched_batch_by_batch(monkeypatch, run, tmp_path):
    fetched, encoded = [], []

    def fetch(doc):
        fetched.append(doc)
        return [doc["image"]]

    requests = to_generate(*(generation(row, doc_to_visual=fetch) for row in range(6)))
    assert fetched == []
    answering = opened(run, budget="0.5-0.75-1.0", records=tmp_path / "r.jsonl", batch_size=2)
    encode = answering.backbone.encode
    monkeypatch.setattr(
        answering.backbone, "encode", lambda queries: encoded.append((len(queries), len(fetched))) or encode(queries)
    )
    answering.records(requests)
    assert encoded == [(2, 2), (2, 4), (2, 6)]


@pytest.mark.parametrize(
    ("until", "cut"),
    [
        (["."], "a red circle"),
        (["\n\n", "circle", "."], "a red "),
        ("red", "a "),
        ([], "a red circle. ASSISTANT: a"),
        (None, "a red circle. ASSISTANT: a"),
        (["", "ASSISTANT:"], "a red circle. "),
    ],
)
def test_stop_strings(until, cut):
    (request,) = to_generate(generation(0, {"until": until}))
    assert request.cut("a red circle. ASSISTANT: a") == cut and request.max_new_tokens == 1024


def test_answers_end_before_a_stop_string(run):
    """The FLOPs are those of all tokens made, those after the stop string too."""
    answering = opened(run)

    def ask(until):
        return [
            own
            for own, *_ in answering.records(
                to_generate(*(generation(n, {**OPTIONS, "until": until}) for n in range(4)))
            )
        ]

    whole = ask([])
    stop = max((own["answer"] for own in whole), key=len)[4:6]
    assert len(stop) == 2
    for before, ended in zip(whole, ask([stop]), strict=True):
        assert ended["answer"] == before["answer"].partition(stop)[0]
        assert all(ended[name] == before[name] for name in ("new_tokens", "spent_llm_flops"))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"do_sample": True, "temperature": 0},
        {"temperature": 0.0, "top_p": 0.9, "num_beams": 1},
        {"do_sample": None, "temperature": None, "image_aspect_ratio": "pad"},
    ],
)
def test_greedy_options_are_taken(options):
    (request,) = to_generate(generation(0, options))
    assert request.max_new_tokens == 1024


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"temperature": 0.2},
            "task 'made' asks for temperature=0.2; answers are greedy here: add --gen_kwargs temper",
        ),
        ({"do_sample": True}, "do_sample=True; .* --gen_kwargs do_sample=False"),
        ({"num_beams": 3, "temperature": 0}, "num_beams=3"),
        ({"repetition_penalty": 1.2}, "repetition_penalty=1.2"),
        ({"visual_cot": True}, "visual_cot=True, which is not supported; known are max_new_tokens, until"),
        ({"max_new_tokens": 0}, "max_new_tokens=0; it must be a whole number above 0"),
    ],
)
def test_other_options_are_refused(options, message):
    with pytest.raises(InputError, match=message):
        to_generate(generation(0, options))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (None, "request 'made/test/3' is text alone"),
        ([], "request 'made/test/3' is text alone"),
        (["clip.mp4"], "request 'made/test/3' comes with a str; images are supported, video and audio are not"),
        ([{"array": 0}], "comes with a dict"),
        ([Image.new("RGB", (8, 8))] * 3, "request 'made/test/3' has 3 images; one is supported, and two side by side"),
    ],
)
def test_requests_without_one_picture_are_named(run, given, message):
    requests = to_generate(generation(3, doc_to_visual=lambda doc: given))
    with pytest.raises(InputError, match=message):
        opened(run).records(requests)


def test_two_pictures_are_put_side_by_side():
    left, right = Image.new("L", (8, 16), 9), Image.new("RGB", (12, 16), "blue")
    (request,) = to_generate(generation(0, doc_to_visual=lambda doc: [left, right]))
    assert np.array_equal(request.query().image, side_by_side(left.convert("RGB"), right))


def test_continuations_are_scored(run, vlm):
    """The log-likelihood is the backbone's; greedy decoding gives a continuation that it has said, and no other."""
    backbone = vlm.backbone
    encoding = backbone.encode([request.query() for request in to_generate(*map(generation, range(3)))])
    answers = backbone.answer(encoding, vlm.planner.plan(encoding, torch.full((3,), 0.6, dtype=torch.float64)), 3)
    said = [" ".join(backbone.processor.tokenizer.convert_ids_to_tokens(ids)) for ids in answers.tokens]
    rows, texts = [0, 1, 2, 0], [*said, "is there a"]
    requests = to_score(*(scoring(row, f" {text}") for row, text in zip(rows, texts, strict=True)))
    records = [own[0] for own in opened(run, budget=0.6, batch_size=3).records(requests)]
    encoding = backbone.encode([request.query() for request in requests])
    masks = vlm.planner.plan(encoding, torch.full((4,), 0.6, dtype=torch.float64))
    expected = backbone.log_likelihood(encoding, masks, texts)
    assert [record["log_likelihood"] for record in records] == pytest.approx(expected.tolist(), abs=1e-4)
    assert [record["new_tokens"] for record in records] == [len(backbone.answer_ids(text)) for text in texts]
    assert [record["greedy"] for record in records] == [True, True, True, False]
    assert all(record["spent_llm_flops"] > record["llm_flops"] for record in records)


def test_scoring_asks_for_a_picture_and_finds_the_target_of_a_document():
    (request,) = to_score(scoring(0, lambda doc: doc["answers"][0]))
    assert request.continuation == "red"
    with pytest.raises(InputError, match="loglikelihood request without a picture"):
        to_score(HarnessRequest(("", "red")))


def test_records_are_written_read_again_and_scored_without_a_vlm(run, tmp_path):
    file = tmp_path / "out" / "records.jsonl"
    requests = to_generate(*map(generation, range(4)), generation(3, __padding_only__=True))
    options = {"budget": "0.6-1.0", "records": str(file), "batch_size": 2}
    answered = opened(run, **options).records(requests)
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    assert [(line["doc_id"], line["budget"]) for line in lines] == [(n, b) for n in range(4) for b in (0.6, 1.0)]
    assert lines == [record for own in answered[:4] for record in own]
    for column, budget in enumerate((0.6, 1)):
        again = Arguments.read({"answers": str(file), "budget": budget}).open().records(requests[3::-1])
        assert again == [[own[column]] for own in answered[3::-1]]
    with pytest.raises(InputError, match=r"records.jsonl' exists already"):
        opened(run, **options)


@pytest.mark.parametrize(
    ("content", "budget", "message"),
    [
        (None, 0.5, "does not exist; give a file that records=FILE has made"),
        ("{", 0.5, "is not readable"),
        ("[1]\n", 0.5, "is not readable"),
        ("", 0.5, "has none for budget 0.5; it has budgets none"),
        ("whole", 0.25, "has none for budget 0.25; it has budgets 0.5"),
    ],
)
def test_answers_that_are_not_there(run, tmp_path, content, budget, message):
    file = tmp_path / "records.jsonl"
    if content == "whole":
        opened(run, records=str(file)).records(to_generate(generation(0)))
    elif content is not None:
        file.write_text(content)
    with pytest.raises(InputError, match=message):
        Arguments.read({"answers": str(file), "budget": budget}).open()


def test_answers_to_other_requests_are_not_taken(run, tmp_path):
    file = tmp_path / "records.jsonl"
    opened(run, records=str(file)).records(to_generate(generation(0)))
    recorded = Arguments.read({"answers": str(file)}).open()
    others = [generation(1), generation(0, context="why?"), generation(0, {**OPTIONS, "max_new_tokens": 4})]
    for other in others:
        with pytest.raises(InputError, match=r"has none for request 'made/test/\d' at budget 0.5 with this context"):
            recorded.records(to_generate(other))


def test_each_process_writes_a_file_of_its_own(run, tmp_path):
    arguments = Arguments.read({"pretrained": str(run), "device": "cpu", "records": str(tmp_path / "records.jsonl")})
    for rank in range(2):
        arguments.open(rank, processes=2, local_rank=rank).records(to_generate(generation(rank)))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["records-0.jsonl", "records-1.jsonl"]


def test_means_by_figure_and_budget():
    """Two requests of a batch that took 10 ms to encode and 30 ms to answer, one alone with 4 and 6 ms: 25 ms each."""
    names = ("llm_flops_ratio", "llm_flops", "total_flops", "spent_llm_flops", "kept_tokens", "kept_heads")
    same = dict.fromkeys((*names, "kept_layers"), 2.0)
    shared = {**same, "budget": 0.5, "new_tokens": 3, "encode_ms": 10.0, "answer_ms": 30.0, "batch": 2}
    alone = {**same, "budget": 0.5, "new_tokens": 1, "encode_ms": 4.0, "answer_ms": 6.0, "batch": 1, "kept_tokens": 5.0}
    found = throughput([[shared], [shared], [alone]])
    assert found["total_gen_tokens"] == 7 and found["total_elapsed_time"] == pytest.approx(0.05)
    assert found["avg_speed"] == pytest.approx(140)
    means = found["additional_metrics"]
    assert means["total_requests"] == 3 and means["kept_tokens@0.5"] == 3.0 and means["kept_layers@0.5"] == 2.0
    assert means["encode_ms@0.5"] == pytest.approx(14 / 3) and means["answer_ms@0.5"] == pytest.approx(12)
