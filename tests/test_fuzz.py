"""Properties of what reads files and texts of users: a value or an ``InputError``, whatever comes in; and what is
written is read back."""

from __future__ import annotations

import json
import random
import string
from dataclasses import asdict

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from maskgym.backbones.latency_model import FEATURES, LatencyModel
from maskgym.common.atomic import write_atomically
from maskgym.common.naming import parse_options
from maskgym.common.plain_files import read_records
from maskgym.common.run_folder import RunFolder
from maskgym.envs import WeightedReward
from maskgym.envs.data.benchmarks.reading import json_entries, json_lines
from maskgym.eval import cli
from maskgym.eval.policies import split_variants
from maskgym.policies.static.searched import SearchedOrder
from maskgym.training.rl import RLConfig
from tests import fuzz

pytestmark = pytest.mark.slow

QUICK = settings(
    max_examples=25,
    deadline=1000 * fuzz.SECONDS_AN_INPUT,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
    database=None,
    derandomize=True,
)


@pytest.fixture(scope="module")
def readers():
    return fuzz.targets()


def test_every_reader_takes_what_is_whole(readers, tmp_path):
    """The null of the next test: readers that refuse all would pass it."""
    for number, (name, target) in enumerate(readers.items()):
        for whole in target.whole:
            assert fuzz.outcome(target, whole, fuzz.folder_of(str(tmp_path), number)) == "taken", name


@QUICK
@given(content=st.binary(max_size=400) | st.text(max_size=200).map(lambda text: text.encode("utf-8", "replace")))
def test_arbitrary_bytes_are_taken_or_refused(content, readers, tmp_path):
    for number, target in enumerate(readers.values()):
        assert fuzz.outcome(target, content, fuzz.folder_of(str(tmp_path), number)) in ("taken", "refused")


@QUICK
@given(seed=st.integers(0, 2**32))
def test_spoilt_files_are_taken_or_refused(seed, readers, tmp_path):
    rng = random.Random(seed)
    for number, target in enumerate(readers.values()):
        content = fuzz.spoil(rng, target.whole)
        assert fuzz.outcome(target, content, fuzz.folder_of(str(tmp_path), number)) in ("taken", "refused")


def test_the_fuzzer_finds_what_is_planted(tmp_path):
    """Another exception, an end of the process and a hang are defects; an ``InputError`` and ``--help`` are none."""
    for raised in (ZeroDivisionError(), SystemExit(1), RecursionError()):
        with pytest.raises((type(raised), AssertionError)):
            fuzz.outcome(fuzz.Target(lambda *_, raised=raised: (_ for _ in ()).throw(raised), [b""]), b"", tmp_path)
    with pytest.raises(TimeoutError), fuzz.within(1):
        while True:
            pass
    assert fuzz.outcome(fuzz.Target(lambda *_: exec("raise SystemExit(0)"), [b""]), b"", tmp_path) == "taken"


def test_the_command_counts_its_inputs(capsys):
    assert fuzz.main(["--seconds", "0.01"]) == 0
    assert "inputs to" in capsys.readouterr().out.splitlines()[-1]


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda children: st.lists(children, max_size=4) | st.dictionaries(st.text(), children, max_size=4),
    max_leaves=10,
)
NAMES = st.text(string.ascii_letters, min_size=1, max_size=8)
FINITE = st.floats(0, 1e6)


@QUICK
@given(lines=st.lists(st.dictionaries(st.text().filter(lambda name: name != "self"), JSON, max_size=4), max_size=5))
def test_metrics_are_read_as_they_were_logged(lines, tmp_path):
    folder = RunFolder(tmp_path)
    (tmp_path / "metrics.jsonl").unlink(missing_ok=True)
    for line in lines:
        folder.log(**line)
    assert folder.metrics() == lines
    folder.truncate_metrics(2)
    assert folder.metrics() == lines[:2]


@QUICK
@given(records=st.lists(st.dictionaries(st.text(), JSON, max_size=4), max_size=4))
def test_records_and_json_are_read_as_they_were_written(records, tmp_path):
    cli.write_json(tmp_path / "records.json", records)
    assert read_records(tmp_path / "records.json") == records
    assert [value for _, value in json_entries(tmp_path / "records.json")] == records
    write_atomically(tmp_path / "a.jsonl", "".join(json.dumps(record) + "\n" for record in records).encode())
    assert list(json_lines(tmp_path / "a.jsonl")) == records


@QUICK
@given(weights=st.tuples(*[FINITE] * len(FEATURES)), device=st.text(), backbone=st.text(), error=FINITE)
def test_latency_models_are_read_as_they_were_saved(weights, device, backbone, error, tmp_path):
    model = LatencyModel(device, backbone, weights, error)
    model.save(tmp_path / "latency.json")
    assert LatencyModel.load(tmp_path / "latency.json") == model


@QUICK
@given(order=st.lists(st.lists(st.integers(0, 99), max_size=3), max_size=5), name=st.text(), flops=st.lists(FINITE))
def test_plans_are_read_as_they_were_saved(order, name, flops, tmp_path):
    plan = SearchedOrder(name, (16, 3, 4), name, "train", 7, order, flops, flops)
    plan.save(tmp_path / "plan.json")
    assert asdict(SearchedOrder.load(tmp_path / "plan.json")) == asdict(plan)


@settings(QUICK, max_examples=5)
@given(
    seed=st.integers(0, 2**32 - 1),
    rate=st.floats(1e-9, 1.0),
    fit=st.booleans(),
    reward=st.lists(st.sampled_from(["accuracy", "-0.2*flops", "my_rewards:shape"]), min_size=1, max_size=3),
    wandb=st.none() | NAMES,
    limit=st.none() | st.integers(1, 99),
)
def test_configs_are_read_as_runs_write_them(seed, rate, fit, reward, wandb, limit, tmp_path_factory):
    out = tmp_path_factory.mktemp("run") / "run"
    config = RLConfig(
        seed=seed, learning_rate=rate, fit=fit, reward=tuple(reward), test_queries=limit, group=wandb, out=out
    )
    RunFolder.create(out, config)
    read = cli.parse(RLConfig, ["--config", str(out / "config.yaml"), "--out", str(out)])
    assert asdict(read) == {**asdict(config), "group": None}  # says where a run is tracked, not what it is


def maker(size: int = 1, share: float = 0.5, name: str = "", on: bool = False, parts: tuple[str, ...] = ()) -> None:
    """Takes an option of each kind."""


WORDS = st.text(string.ascii_letters + string.digits, max_size=8)


@QUICK
@given(size=st.integers(0, 10**9), share=st.floats(-1e9, 1e9), name=WORDS, on=st.booleans(), parts=st.lists(WORDS))
def test_options_are_read_as_they_are_spelled(size, share, name, on, parts):
    given = {"size": size, "share": share, "name": name, "on": on, "parts": tuple(parts) or ("",)}
    spelled = f"size={size},share={share!r},name={name},on={str(on).lower()},parts={'-'.join(parts)}"
    assert parse_options(maker, "made", spelled) == given


@QUICK
@given(weight=st.floats(-1e9, 1e9), name=st.sampled_from(["accuracy", "flops", "soft-accuracy"]))
def test_rewards_are_read_as_they_are_spelled(weight, name):
    ((own, factor, _),) = WeightedReward(f"{weight!r}*{name}").parts
    assert (own, factor) == (name, weight)


@QUICK
@given(base=NAMES, variants=st.lists(st.sampled_from(["merge", "original", "renumbered", "restored", "0.25", "1"])))
def test_policies_are_split_as_they_are_joined(base, variants):
    assert split_variants("@".join([base, *variants])) == (base, variants)
