"""Constructors and functions refuse arguments that they cannot use: an ``InputError`` in one line that says which."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from maskgym import AdaptiveVLM
from maskgym.backbones import InputError, MaskLayout, load_backbone
from maskgym.backbones.latency_model import LatencyModel
from maskgym.envs import (
    MaskingCore,
    MaskingEnv,
    MaskingVecEnv,
    MaskingVectorEnv,
    RewardTerms,
    WeightedReward,
    load_queries,
)
from maskgym.eval.measure.evaluate import check_budgets, evaluate
from maskgym.eval.policies import load_planner
from maskgym.lmms.arguments import Arguments
from maskgym.policies import ControllerConfig, TwoLevelController, load_controller, project
from maskgym.policies.baselines import RandomPlanner
from tests.conftest import build
from tests.refusals import snapshot


@dataclass(frozen=True)
class Call:
    """A call that must be refused.

    Attributes:
        id: what is wrong.
        call: with what it may use.
        words: that the message must have.
    """

    id: str
    call: Callable[[Any], Any]
    words: str


@pytest.fixture(scope="module")
def given(desk, source):
    """A backbone, its controller, two encoded queries, and the desk's places."""
    backbone = build()
    controller = TwoLevelController(ControllerConfig.for_layout(backbone.layout, backbone.hidden, width=8))
    encoding = backbone.encode([source[0], source[1]])
    core = {"backbone": backbone, "data": source}
    env = MaskingEnv(**core)
    env.reset(seed=0)
    return SimpleNamespace(
        backbone=backbone,
        controller=controller,
        vlm=AdaptiveVLM(controller, backbone, "made"),
        source=source,
        query=source[0],
        encoding=encoding,
        full=backbone.full(encoding),
        core=core,
        env=env,
        at=desk,
    )


def masks(given, **changes):
    return replace(given.full, **changes)


def answer(given, **changes):
    return given.backbone.answer(given.encoding, masks(given, **changes))


def ask(given, **changes):
    return given.vlm.generate(**{"images": given.query.image, "questions": given.query.question, **changes})


def encode(given, **changes):
    return given.backbone.encode([replace(given.query, **changes)])


TERMS = RewardTerms(*(np.linspace(0.1, 0.9, 3) for _ in range(7)))


def reward(function):
    return lambda _: WeightedReward(function)(TERMS, ["a", "b", "c"])


def overwrite(terms):
    terms.accuracy[:] = 1
    return terms.accuracy


def actions(given, value):
    action = np.ones(given.backbone.layout.size)
    action[3] = value
    return action


MASKS = [
    Call("tokens of another layout", lambda g: answer(g, tokens=torch.ones(2, 9, dtype=torch.bool)), "(2, 9)"),
    Call("heads of another layout", lambda g: answer(g, heads=torch.ones(2, 3, 9, dtype=torch.bool)), "(2, 3, 9)"),
    Call("layers of another layout", lambda g: answer(g, layers=torch.ones(2, 9, dtype=torch.bool)), "(2, 9)"),
    Call("one axis less", lambda g: answer(g, layers=torch.ones(2, dtype=torch.bool)), "(2,)"),
    Call("fewer rows", lambda g: g.backbone.answer(g.encoding, g.full[:1]), "(1, 16)"),
    Call("no rows", lambda g: g.backbone.answer(g.encoding, g.full[:0]), "(0, 16)"),
    Call("numbers for tokens", lambda g: answer(g, tokens=torch.ones(2, 16)), "torch.float32"),
    Call("integers for heads", lambda g: answer(g, heads=g.full.heads.long()), "torch.int64"),
    Call("integers for layers", lambda g: answer(g, layers=g.full.layers.to(torch.uint8)), "torch.uint8"),
    Call("another device", lambda g: answer(g, tokens=g.full.tokens.to("meta")), "meta"),
    Call("no layer", lambda g: answer(g, layers=torch.zeros(2, 3, dtype=torch.bool)), "keeps no layer"),
    Call("no layer in a row", lambda g: answer(g, layers=torch.tensor([[1, 0, 0], [0, 0, 0]]).bool()), "row 1"),
    Call(
        "a protected layer dropped", lambda g: answer(g, layers=torch.tensor([[0, 1, 1]] * 2).bool()), "drops layer 0"
    ),
    Call("no new tokens", lambda g: g.backbone.answer(g.encoding, g.full, 0), "max_new_tokens is 0"),
    Call("references for fewer", lambda g: g.backbone.answer(g.encoding, g.full, 1, ["red"]), "1 references"),
    Call("an empty reference", lambda g: g.backbone.answer(g.encoding, g.full, 1, ["red", ""]), "''"),
    Call("layout without layers", lambda _: MaskLayout(16, 0, 4), "MaskLayout.layers is 0"),
    Call("layout below zero", lambda _: MaskLayout(16, 3, -4), "MaskLayout.heads is -4"),
    Call("a protected layer below zero", lambda _: MaskLayout(16, 3, 4, (-1,)), "[-1] do not exist"),
    *(
        Call(f"action with {value}", lambda g, value=value: g.backbone.layout.parse(actions(g, value)), str(value))
        for value in (2, -1, 0.5, float("nan"), float("inf"))
    ),
    Call("action of words", lambda g: g.backbone.layout.parse(np.full(31, "keep")), "keep"),
    Call("action of three axes", lambda g: g.backbone.layout.parse(np.ones((1, 1, 31))), "flat vector of"),
    Call("no action", lambda g: g.backbone.layout.parse(None), "flat vector of"),
    Call("ragged actions", lambda g: g.backbone.layout.parse([[1, 0], [1]]), "flat vector of"),
    Call(
        "budget for fewer",
        lambda g: project(g.backbone, g.full, torch.zeros(2, 31), torch.ones(1), g.encoding),
        "(1,)",
    ),
    Call(
        "confidence of another layout",
        lambda g: project(g.backbone, g.full, torch.zeros(2, 9), torch.ones(2), g.encoding),
        "(2, 9)",
    ),
    *(
        Call(
            f"a plan for budget {budget}",
            lambda g, budget=budget: RandomPlanner(g.backbone).plan(g.encoding, torch.tensor([0.9, budget])),
            "budget",
        )
        for budget in (0.0, -1.0, float("nan"), 1e-9)
    ),
]

BACKBONES = [
    Call("no head slots", lambda g: build(slots=0), "heads is 0"),
    Call("head slots below zero", lambda g: build(slots=-2), "heads is -2"),
    Call("answers of no tokens", lambda g: build(expected_answer_tokens=0), "expected_answer_tokens is 0"),
    Call("a protected layer that is not there", lambda g: build(protected_layers=(7,)), "[7] do not exist"),
    Call("a width that is none", lambda g: build(width="mlp"), "width is 'mlp'"),
    Call("no name", lambda _: load_backbone(""), "''"),
    Call("a file as backbone", lambda g: load_backbone(str(g.at["desk"] / "empty")), "it is a file"),
    Call("a home that is not there", lambda _: load_backbone("~nobody-of-this-name/vlm"), "there is no such folder"),
    Call("a run as backbone", lambda g: load_backbone(str(g.at["run"])), "could not be read"),
    Call("a device that is none", lambda g: load_backbone(str(g.at["vlm"]), device="cuda:99x"), "cuda:99x"),
    Call("a dtype of integers", lambda g: load_backbone(str(g.at["vlm"]), dtype=torch.int8), "torch.int8"),
    Call("no queries", lambda g: g.backbone.encode([]), "no queries"),
    Call("a picture that is a text", lambda g: encode(g, image="a.png"), "of type str"),
    Call("a picture that is an array", lambda g: encode(g, image=np.zeros((4, 4, 3))), "of type ndarray"),
    Call("a question that is none", lambda g: encode(g, question=None), "question of query 'q0' is of type NoneType"),
    Call("a question that is a number", lambda g: encode(g, question=7), "question of query 'q0' is of type int"),
    Call("a question of bytes", lambda g: encode(g, question=b"what?"), "question of query 'q0' is of type bytes"),
    Call("a very long question", lambda g: encode(g, question="red " * 100_000), "shorten the question"),
    Call("the image token", lambda g: encode(g, question="what <image> is this?"), "image placeholders"),
]

ASKED = [
    *(
        Call(f"budget {budget!r}", lambda g, budget=budget: ask(g, budget=budget), words)
        for budget, words in (
            ("0.5", "budget '0.5' is no number"),
            ("half", "budget 'half' is no number"),
            (-0.5, "budget -0.5"),
            (float("inf"), "budget inf"),
            ([], "no budget"),
            ([None], "budget None is no number"),
            (["0.5"], "budget '0.5' is no number"),
            ([0.5, 0.5, 0.5], "3 budgets"),
            ({}, "no budget"),
            (1e-300, "the least budget"),
            (0.5j, "0.5j"),
            (True, "budget True is no number"),
            (np.True_, "budget True is no number"),
            ({0.5}, "budget {0.5} is no number"),
            (np.array("a"), "budget 'a' is no number"),
            (np.zeros((1, 1)), "budget [0.0] is no number"),
            (torch.tensor(float("nan")), "budget nan"),
            (torch.zeros(0), "no budget"),
            (torch.ones(2), "2 budgets"),
            ((0.5 for _ in range(2)), "2 budgets"),
        )
    ),
    *(
        Call(f"latency {given!r}", lambda g, given=given: ask(g, latency_ms=given), "latency_ms needs a latency model")
        for given in (0, float("nan"))
    ),
    Call("latency in a list", lambda g: ask(g, latency_ms=[1.0]), "latency_ms is [1.0]; it must be one number"),
    Call("budget and latency", lambda g: ask(g, budget=[0.5], latency_ms=1.0), "stand for each other"),
    Call("a stream of several", lambda g: ask(g, questions=iter("ab"), stream=True), "2 were given"),
    Call("a set of questions", lambda g: ask(g, images=[g.query.image] * 2, questions={"a", "b"}), "2 images and 1"),
    *(
        Call(
            f"max_new_tokens {given!r}",
            lambda g, given=given: ask(g, max_new_tokens=given),
            f"max_new_tokens is {given!r}",
        )
        for given in (-1, "8", 1.5, None)
    ),
    *(
        Call(f"questions {given!r}", lambda g, given=given: ask(g, questions=given), words)
        for given, words in (
            (None, "of type NoneType"),
            (7, "of type int"),
            (b"what?", "of type bytes"),
            ([None], "of type NoneType"),
            ([], "0 questions"),
            (["a", "b"], "1 images and 2 questions"),
        )
    ),
    *(
        Call(f"images {given!r}", lambda g, given=given: ask(g, images=given), words)
        for given, words in (
            ([], "0 images"),
            (7, "of type int"),
            (b"\x89PNG", "of type bytes"),
            ("", "image ''"),
            ("a\0b", "a\\x00b"),
            ("x" * 5000, "xxx"),
            ("/dev/null", "cannot be decoded"),
            ("/", "cannot be decoded"),
            ({"image": 1}, "of type dict"),
        )
    ),
    Call("a row that is a number", lambda g: g.vlm(7), "input 0 is a int"),
    Call("rows without a picture", lambda g: g.vlm([{"text": "?"}]), "input 0 is the keys text"),
    Call("no place", lambda _: AdaptiveVLM.from_pretrained(""), "neither a run folder"),
    Call("a file as place", lambda g: AdaptiveVLM.from_pretrained(g.at["desk"] / "empty"), "neither a run folder"),
    Call("a data set as place", lambda g: AdaptiveVLM.from_pretrained(g.at["data"]), "neither a run folder"),
    Call("a vlm as place", lambda g: AdaptiveVLM.from_pretrained(g.at["vlm"]), "neither a run folder"),
    Call(
        "a run for another backbone",
        lambda g: AdaptiveVLM.from_pretrained(g.at["run"], backbone="tiny"),
        "backbone 'tiny' has",
    ),
    Call(
        "a latency model that is none",
        lambda g: AdaptiveVLM.from_pretrained(g.at["run"], latency_model=g.at["desk"] / "text.json"),
        "no readable latency model",
    ),
    Call("a device that is none", lambda g: AdaptiveVLM.from_pretrained(g.at["run"], device="abacus"), "'abacus'"),
    Call("saving into a file", lambda g: g.vlm.save_pretrained(g.at["desk"] / "empty" / "x"), "is a file"),
    Call("saving over a file", lambda g: g.vlm.save_pretrained(g.at["desk"] / "empty"), "File exists"),
]

ENVIRONMENTS = [
    *(
        Call(f"budgets {given!r}", lambda g, given=given: MaskingCore(**g.core, budgets=given), words)
        for given, words in (
            ((), "budgets are ()"),
            ((0.5,), "budgets are (0.5,)"),
            ((0.1, 0.5, 1.0), "budgets are (0.1, 0.5, 1.0)"),
            ((float("nan"), 1.0), "budgets are (nan, 1.0)"),
            ((0.5, float("inf")), "budgets are (0.5, inf)"),
            (("low", "high"), "low"),
            (0.5, "0.5"),
            ("01", "01"),
            (None, "None"),
            ({0.5, 1.0}, "budgets are {0.5, 1.0}"),
            ({0.5: 1, 1.0: 1}, "budgets are {0.5: 1"),
            (torch.ones(2, 2), "budgets are tensor([[1., 1.], [1., 1.]])"),
            ((0.5, 10**400), "budgets are (0.5, 100"),
        )
    ),
    Call("a render mode", lambda g: MaskingEnv(**g.core, render_mode="human"), "render_mode is 'human'"),
    Call(
        "several reset to fewer budgets",
        lambda g: MaskingVectorEnv(2, **g.core).reset(options={"budget": [0.5]}),
        "has 1 values for 2 slots",
    ),
    Call("positions", lambda g: MaskingCore(**g.core, positions="kept"), "positions are 'kept'"),
    Call("no new tokens", lambda g: MaskingCore(**g.core, max_new_tokens=0), "max_new_tokens is 0"),
    Call("split", lambda g: MaskingCore(g.backbone, str(g.at["data"]), split="dev"), "split is 'dev'"),
    Call("no environments", lambda g: MaskingVectorEnv(0, **g.core), "0 environments"),
    Call("environments below zero", lambda g: MaskingVecEnv(MaskingCore(**g.core), -2), "-2 environments"),
    Call("no plans a query", lambda g: MaskingVecEnv(MaskingCore(**g.core), 2, 0), "groups of 0"),
    *(
        Call(f"reset to {given}", lambda g, given=given: g.env.reset(options=given), words)
        for given, words in (
            ({"query": -1}, "query number -1 does not exist"),
            ({"query": 10**6}, "query number 1000000 does not exist"),
            ({"query": "first"}, "first"),
            ({"budget": float("nan")}, "budget nan"),
            ({"budget": 0}, "budget 0"),
            ({"budget": "half"}, "half"),
            ({"bugdet": 0.5}, "bugdet"),
        )
    ),
    *(
        Call(f"step {name}", lambda g, value=value: g.env.step(value), words)
        for name, value, words in (
            ("without action", None, "flat vector of"),
            ("too short", np.ones(3), "flat vector of"),
            ("too long", np.ones(99), "flat vector of"),
            ("of a word", "keep", "flat vector of"),
        )
    ),
]

REWARDS = [
    Call("raises", reward(lambda terms: 1 / 0), "raised ZeroDivisionError: division by zero (queries a, b, c)"),
    Call("returns None", reward(lambda terms: None), "returned shape ()"),
    Call("returns a word", reward(lambda terms: "much"), "raised ValueError"),
    Call("returns words", reward(lambda terms: np.array(["a", "b", "c"])), "raised ValueError"),
    Call("returns complex numbers", reward(lambda terms: terms.accuracy * 1j), "complex"),
    Call("returns a number", reward(lambda terms: 1.0), "returned shape ()"),
    Call("returns a row too many", reward(lambda terms: np.ones(4)), "returned shape (4,)"),
    Call("returns a column", reward(lambda terms: np.ones((3, 1))), "returned shape (3, 1)"),
    Call("returns nothing", reward(lambda terms: []), "returned shape (0,)"),
    Call("returns ragged lists", reward(lambda terms: [[1], [1, 2], []]), "raised ValueError"),
    Call("returns nan", reward(lambda terms: terms.accuracy * np.nan), "returned nan in 3 of 3 rows"),
    Call("returns inf", reward(lambda terms: [1, np.inf, 2]), "returned inf in 1 of 3 rows (queries b)"),
    Call("writes to its input", reward(overwrite), "read-only"),
    Call("sets its input", reward(lambda terms: setattr(terms, "accuracy", 1)), "FrozenInstanceError"),
    Call("a number", lambda _: WeightedReward(3), "3"),
    Call("None", lambda _: WeightedReward(None), "None"),
    Call("numbers", lambda _: WeightedReward([3]), "3"),
    *(
        Call(f"spec {spec!r}", lambda _, spec=spec: WeightedReward(spec), words)
        for spec, words in (
            ("", "unknown reward ''"),
            ("*", "weight ''"),
            ("2*", "unknown reward ''"),
            ("*accuracy", "weight ''"),
            ("1e999*accuracy", "weight '1e999'"),
            ("2**accuracy", "weight '2*'"),
            ("ACCURACY", "unknown reward 'ACCURACY'"),
            (" accuracy", "unknown reward ' accuracy'"),
            ("accuracy\0", "unknown reward"),
            ("a.b:c:d", "cannot be imported"),
            ("..envs:x", "cannot be imported"),
            ("\ud800:x", "cannot be imported"),
            (["accuracy", ""], "unknown reward ''"),
        )
    ),
]

QUERIES = [
    *(
        Call(f"data {data!r}", lambda g, data=data: load_queries(data.format(**g.at), "test"), words)
        for data, words in (
            ("", "unknown data ''"),
            ("+", "unknown data ''"),
            ("scenes+", "unknown data ''"),
            ("scenes:size", "has no option 'size'"),
            ("scenes:size=", "has no option 'size='"),
            ("scenes:size=31", "size must be at least 32"),
            ("scenes:size=big", "has no option 'size=big'"),
            ("scenes:images=0", "images 1"),
            ("scenes:images=-1", "has no option 'images=-1'"),
            ("scenes:size=64,size=32", "twice"),
            ("scenes:split=test", "has no option 'split=test'"),
            ("scenes:colour=red", "has no option 'colour=red'"),
            ("easy-vqa:size=64", "it has no options"),
            ("vqav2", "needs root=FOLDER"),
            ("gqa:root=", "needs root=FOLDER"),
            ("mme:root=/nowhere", "'/nowhere' does not exist"),
            ("pope:root={mine}", "lacks"),
            ("vizwiz:root={mine},part=mine", "has no part 'mine'"),
            ("mmbench:root={mine},prompt=nowhere.txt", "prompt is 'nowhere.txt'"),
            ("clevr:root={mine},benchmark=gqa", "has no option 'benchmark=gqa'"),
            ("a\0b", "a"),
            ("x" * 5000, "unknown data"),
            ("{desk}/empty", "suffix ''"),
            ("{desk}/text.json", "could not be read"),
            ("{desk}/list.json", "lacks the column 'image'"),
            ("{mine}", "has no rows"),
            ("{vlm}", "has no split 'test'"),
            ("{run}", "has no split 'test'"),
            ("{desk}/empty+scenes", "suffix ''"),
        )
    ),
    Call("no split", lambda g: load_queries(str(g.at["data"]), None), "split is None"),
    Call("a limit below zero", lambda g: load_queries(str(g.at["data"]), "test", -3), "limit is -3"),
    Call("a spread of none", lambda g: g.source.spread(0), "limit is 0"),
    Call("a head of none", lambda g: g.source.head(0), "limit is 0"),
]

CONTROLLERS = [
    Call("width", lambda _: ControllerConfig(16, 3, 4, 32, width=0), "width is 0"),
    Call("pools", lambda _: ControllerConfig(16, 3, 4, 32, pools=-1), "pools is -1"),
    Call("tokens", lambda _: ControllerConfig(0, 3, 4, 32), "tokens is 0"),
    Call("text_tokens", lambda _: ControllerConfig(16, 3, 4, 32, text_tokens=0), "text_tokens is 0"),
    Call("rule", lambda _: ControllerConfig(16, 3, 4, 32, rule="all"), "rule is 'all'"),
    Call("axes", lambda _: ControllerConfig(16, 3, 4, 32, axes=("depth",)), "axes are depth"),
    Call("positions", lambda _: ControllerConfig(16, 3, 4, 32, positions="kept"), "positions are 'kept'"),
    Call("nowhere", lambda g: load_controller(g.at["desk"] / "nowhere", g.backbone), "no readable controller"),
    Call("in a file", lambda g: load_controller(g.at["desk"] / "empty", g.backbone), "no readable controller"),
    Call("no latency model", lambda g: LatencyModel.load(g.at["desk"] / "nowhere"), "no readable latency model"),
    *(
        Call(f"check_budgets({given!r})", lambda _, given=given: check_budgets(given), words)
        for given, words in (
            ("0.5", "budget '0' is no number"),
            ([None], "budget None is no number"),
            ([[0.5]], "budget [0.5] is no number"),
            ([0.5, "1"], "budget '1' is no number"),
            ([float("nan")], "budget nan"),
        )
    ),
    Call(
        "evaluate at nothing",
        lambda g: evaluate(RandomPlanner(g.backbone), g.backbone, MaskingCore(**g.core).bank, []),
        "no budget given",
    ),
    *(
        Call(f"policy {policy!r}", lambda g, policy=policy: load_planner(policy, g.backbone, 0), words)
        for policy, words in (
            ("", "unknown policy ''"),
            ("@", "unknown policy '@'"),
            ("@merge", "unknown policy ''"),
            ("even:seed=1", "has no option 'seed=1'"),
            ("even then", "unknown policy 'even then'"),
            ("Full", "unknown policy 'Full'"),
            ("full:x=1", "has no option 'x=1'"),
            ("stride@0.5@0.25", "does not choose"),
            ("stride@1e-3", "unknown policy"),
            ("random@99999999999", "share"),
        )
    ),
]

LMMS = [
    *(
        Call(f"read with {given}", lambda _, given=given: Arguments.read({"pretrained": "x", **given}), words)
        for given, words in (
            ({"budget": ""}, "budget= is no share"),
            ({"budget": None}, "budget=None is no share"),
            ({"budget": float("nan")}, "budget nan"),
            ({"budget": "0.5-half"}, "budget=0.5-half"),
            ({"budget": -0.5}, "budget=-0.5 is no share"),
            ({"budget": "0.5--1"}, "budget=0.5--1"),
            ({"dtype": None}, "dtype=None"),
            ({"dtype": "FLOAT32"}, "dtype=FLOAT32"),
            ({"batch": 1}, "unknown option 'batch'"),
        )
    ),
    *(
        Call(
            f"opened with {given}",
            lambda g, given=given: Arguments.read({"pretrained": str(g.at["run"]), "device": "cpu", **given}).open(),
            words,
        )
        for given, words in (
            ({"batch_size": -1}, "batch_size '-1'"),
            ({"batch_size": 1.5}, "batch_size '1.5'"),
            ({"batch_size": ""}, "batch_size ''"),
            ({"device": "abacus"}, "'abacus'"),
            ({"pretrained": ""}, "neither a run folder"),
        )
    ),
    Call(
        "records inside a file",
        lambda g: Arguments.read({"pretrained": "x", "records": str(g.at["desk"] / "empty" / "r")}).open(),
        "has no folder to lie in",
    ),
    *(
        Call(
            f"answers in {name}",
            lambda g, name=name: Arguments.read({"answers": str(g.at["desk"] / name)}).open(),
            words,
        )
        for name, words in (
            ("text.json", "is not readable"),
            ("deep.json", "is not readable"),
            ("list.json", "is not readable"),
            ("number.json", "is not readable"),
            ("latin.json", "is not readable"),
            ("empty", "it has budgets none"),
            ("nowhere", "does not exist"),
            (".", "is not readable"),
        )
    ),
]

TABLES = {
    "masks": MASKS,
    "backbones": BACKBONES,
    "asked": ASKED,
    "environments": ENVIRONMENTS,
    "rewards": REWARDS,
    "queries": QUERIES,
    "controllers": CONTROLLERS,
    "lmms": LMMS,
}
CALLS = [pytest.param(call, id=f"{name}: {call.id[:80]}") for name, calls in TABLES.items() for call in calls]


@pytest.mark.parametrize("call", CALLS)
def test_bad_calls(call, given, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    before = snapshot(given.at["place"], tmp_path)
    with pytest.raises(InputError) as caught:
        call.call(given)
    message = str(caught.value)
    assert call.words in message and "\n" not in message
    assert snapshot(given.at["place"], tmp_path) == before


def test_what_is_odd_but_right_is_taken(given):
    """The null of the tables: what they use works where nothing is wrong with it."""
    assert len(answer(given).texts) == 2 and ask(given, budget=0.9).text is not None
    assert (
        ask(given, questions="").text is not None
        and encode(given, question="\x00\u202e\U0001f600 \ud7ff\n\t?") is not None
    )
    assert ask(given, budget=np.float32(0.9)).budget == pytest.approx(0.9)
    no_tokens = torch.zeros_like(given.full.tokens)
    assert len(answer(given, tokens=no_tokens).texts) == 2
    assert WeightedReward(lambda terms: torch.ones(3))(TERMS).tolist() == [1, 1, 1]
    assert ask(given, images=Image.new("CMYK", (9, 9))).text is not None
