"""``python -m maskgym.eval run`` with times and limits in milliseconds, and ``python -m maskgym.eval latency``."""

import json

import datasets
import pytest
import torch

import maskgym.eval.__main__ as eval_main
from maskgym.backbones import EncodingBank, load_backbone
from maskgym.backbones.latency_model import LatencyModel
from maskgym.envs.data.queries import DatasetQueries
from maskgym.eval.measure.latency import device_name
from maskgym.eval.measure.timing import first_queries
from tests.conftest import command, make_dataset

WEIGHTS = (0.5, 0.2, 1.0, 30.0, 50.0)
TIMES = {"ttft_ms_p50", "ttft_ms_p95", "tpot_ms_p50", "encode_ms_p50", "controller_ms_p50", "prefill_ms_p50"}


def run(monkeypatch, place, tmp_path, *arguments):
    where = ["--backbone", place / "vlm", "--data", place / "data"]
    command(monkeypatch, eval_main.main, "run", *arguments, *where, "--json", tmp_path / "records.json")
    return json.loads((tmp_path / "records.json").read_text())


@pytest.fixture
def latency_file(place, tmp_path):
    """A latency model as if calibrated here."""
    file = tmp_path / "latency.json"
    LatencyModel(device_name(torch.device("cpu")), str(place / "vlm"), WEIGHTS, 0.01).save(file)
    return file


def full_ms(place, file):
    backbone = load_backbone(str(place / "vlm"))
    encoding = EncodingBank(backbone, DatasetQueries(make_dataset(), "made", "test")).gather(range(12))
    return LatencyModel.load(file).predict(backbone, encoding, backbone.full(encoding))


@pytest.mark.slow
def test_timing_adds_times_and_changes_nothing_else(monkeypatch, place, tmp_path, capsys):
    policies = ["full", "random", "--budgets", "0.6", "1.0"]
    plain = run(monkeypatch, place, tmp_path, *policies)
    assert "TTFT" not in capsys.readouterr().out
    timed = run(monkeypatch, place, tmp_path, *policies, "--timing", "2")
    assert "| TTFT ms | TPOT ms |" in capsys.readouterr().out
    for before, after in zip(plain, timed, strict=True):
        added = {key: after.pop(key) for key in [*TIMES, "peak_memory_mb"]}
        assert before == after and min(added.values()) > 0
        assert added["ttft_ms_p50"] <= added["ttft_ms_p95"]


def test_what_is_timed_are_the_first_queries_that_do_not_fail(small):
    rows = make_dataset(8).cast_column("image", datasets.Image(decode=False)).to_dict()
    rows["image"][0] = rows["image"][2] = None
    bank = EncodingBank(small, DatasetQueries(datasets.Dataset.from_dict(rows), "made", "test"))
    assert [query.id for query in first_queries(bank, 3)] == ["q1", "q3", "q4"]
    assert len(first_queries(bank, 20)) == 6


@pytest.mark.slow
def test_limits_in_milliseconds_make_a_record_each(monkeypatch, place, tmp_path, latency_file, capsys):
    low, high = 0.75 * float(full_ms(place, latency_file).min()), 2 * float(full_ms(place, latency_file).max())
    options = ["--milliseconds", low, high, "--latency-model", latency_file]
    records = run(monkeypatch, place, tmp_path, "random", "full", *options, "--timing", "1")
    assert [(record["policy"], record.get("budget_ms")) for record in records] == [
        ("random", low),
        ("random", high),
        ("full", None),
    ]
    assert records[0]["predicted_ms"] <= low < records[1]["predicted_ms"] and records[1]["budget"] == 1
    assert records[0]["llm_flops_ratio"] < records[1]["llm_flops_ratio"] == 1
    assert all(record["budget_violations"] == 0 and record["ttft_ms_p50"] > 0 for record in records)
    assert "| budget ms | predicted ms |" in capsys.readouterr().out
    alone = run(monkeypatch, place, tmp_path, "random", "--milliseconds", high, "--latency-model", latency_file)
    assert alone[0].items() <= records[1].items(), "a limit's record depends on the other limits"


@pytest.mark.slow
def test_latency_measures_and_calibrates(monkeypatch, place, tmp_path, capsys):
    out = tmp_path / "latency.json"
    options = ["--budgets", "0.6", "0.8", "--queries", "3", "--batch-size", "2", "--repeats", "2"]
    where = ["--backbone", place / "vlm", "--data", place / "data", "--out", out]
    command(monkeypatch, eval_main.main, "latency", *options, *where)
    printed = capsys.readouterr().out
    here = device_name(torch.device("cpu"))
    assert f"on {here}, 3 queries, 2 a batch" in printed
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in printed.splitlines() if line.startswith("|")]
    assert " ".join(cells[0]) == "policy budget encode ms controller ms prefill ms TTFT ms TPOT ms peak memory MB"
    assert [row[:2] for row in cells[2:]] == [["full", "1.00"], ["random", "0.60"], ["random", "0.80"]]
    for row in cells[2:]:
        for cell in row[2:7]:
            median, high = map(float, cell.split(" / "))
            assert 0 <= median <= high
    model = LatencyModel.load(out)
    assert (model.device, model.backbone) == (here, str(place / "vlm"))
    assert f"off by {model.error:.1%} (median) on plans held out" in printed


BAD = [
    ("run random --milliseconds 2.5", "needs --latency-model FILE; make one with: python -m maskgym.eval latency"),
    ("run random --latency-model {file}", "--latency-model serves --milliseconds; give limits too"),
    ("run random --milliseconds 2.5 --latency-model nowhere.json", "no readable latency model in 'nowhere.json'"),
    ("run random --milliseconds 0 --latency-model {file}", "a budget of 0 ms is no time"),
    ("run random --milliseconds 0.001 --latency-model {file}", "a budget of 0.001 ms is below the fastest prefill"),
    ("run full --timing -1", "--timing is -1; give a number of queries"),
    ("run full --plot nowhere/a.png", "--plot 'nowhere/a.png' has no folder 'nowhere' to lie in"),
    ("run full --json .", "--json '.' is a folder; name a file"),
    ("latency --out nowhere/a.json", "--out 'nowhere/a.json' has no folder 'nowhere'"),
    ("latency --queries 0", "--queries is 0; it must be at least 1"),
    ("latency --batch-size 0", "--batch-size is 0; it must be at least 1"),
    ("latency --repeats 0", "--repeats is 0; it must be at least 1"),
    ("latency nobody", "unknown policy 'nobody'"),
    ("latency --budgets 2", "budget 2 is outside (0, 1]"),
]


@pytest.mark.parametrize(("line", "words"), BAD)
def test_bad_requests_end_with_status_2_and_one_line(monkeypatch, place, latency_file, capsys, line, words):
    where = ["--backbone", place / "vlm", "--data", place / "data"]
    with pytest.raises(SystemExit) as caught:
        command(monkeypatch, eval_main.main, *line.format(file=latency_file).split(), *where)
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert caught.value.code == 2 and error.startswith("error: ") and words in error


@pytest.mark.parametrize("change", [{"device": "abacus"}, {"backbone": "other"}])
def test_latency_models_of_elsewhere_are_refused(monkeypatch, place, latency_file, capsys, change):
    latency_file.write_text(json.dumps({**json.loads(latency_file.read_text()), **change}))
    with pytest.raises(SystemExit) as caught:
        run(monkeypatch, place, latency_file.parent, "random", "--milliseconds", "2", "--latency-model", latency_file)
    error = capsys.readouterr().err
    assert caught.value.code == 2 and repr(next(iter(change.values()))) in error
    assert f"calibrate here with python -m maskgym.eval latency --backbone {place / 'vlm'}" in error
