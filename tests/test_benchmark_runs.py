"""Benchmarks through the commands: records, the second table, failing images, training, streaming."""

import json
import tracemalloc

import datasets
import pyarrow as pa
import pytest

import maskgym.eval.__main__ as eval_main
import maskgym.training.gumbel as train_gumbel
import maskgym.training.rl as train_rl
from maskgym.backbones import EncodingBank
from maskgym.envs import MaskingCore, load_queries
from maskgym.envs.data.benchmarks import reading
from maskgym.eval.bench.data import write_vqav2
from maskgym.eval.measure.evaluate import evaluate, outcomes
from maskgym.eval.measure.report import tables
from maskgym.policies.baselines import FullPlanner
from tests import benchmark_files
from tests.conftest import command


@pytest.fixture(autouse=True)
def _own_cache(monkeypatch, tmp_path):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture
def made(tmp_path):
    def make(name):
        getattr(benchmark_files, name)(tmp_path / name)
        return f"{name}:root={tmp_path / name}"

    return make


def test_records_hold_the_official_scores_and_a_second_table_shows_them(small, made):
    queries = load_queries(made("pope"), "test")
    bank = EncodingBank(small, queries)
    (outcome,) = outcomes(FullPlanner(small), small, bank, (1.0,), progress=False)
    parts = outcome.record["parts"]
    # the random VLM never says no, so that every answer is a yes
    assert outcome.columns["accuracy"].tolist() == [1, 1, 0, 0, 1, 0, 1, 0] and outcome.record["accuracy"] == 0.5
    assert parts["random"] == {
        "accuracy": 0.5,
        "precision": 0.5,
        "recall": 1,
        "F1": pytest.approx(2 / 3),
        "yes ratio": 1,
    }
    first, second = tables([outcome.record]).split("\n\n")
    assert first.startswith("| policy | budget | accuracy %") and len(first.splitlines()) == 3
    head, _, *rows = ([cell.strip() for cell in line.split("|")[1:-1]] for line in second.splitlines())
    assert head == ["policy", "budget", "part", "accuracy %", "precision %", "recall %", "F1 %", "yes ratio %"]
    assert rows[0] == ["full", "1.00", "random", "50.00", "50.00", "100.00", "66.67", "100.00"]
    assert [row[2] for row in rows] == ["random", "popular", "adversarial", "mean"]


def test_scores_that_are_no_shares_are_shown_as_they_are(small, made):
    bank = EncodingBank(small, load_queries(made("mme"), "test"))
    records = evaluate(FullPlanner(small), small, bank, (1.0,), progress=False)
    lines = tables(records).split("\n\n")[1].splitlines()
    cells = [[cell.strip() for cell in line.split("|")[3:7]] for line in lines]
    assert cells[0] == ["part", "accuracy %", "accuracy+ %", "score"]
    assert cells[2] == ["existence", "0.00", "0.00", "0.0"] and cells[-1] == ["cognition", "", "", "0.0"]


def test_a_run_prints_and_writes_them(monkeypatch, place, made, tmp_path, capsys):
    data, out = made("mmbench"), tmp_path / "records.json"
    options = ["--backbone", place / "vlm", "--data", data, "--budgets", "0.6", "--json", out]
    command(monkeypatch, eval_main.main, "run", "full", "random", *options)
    records = json.loads(out.read_text())
    assert [set(record["parts"]) for record in records] == [{"l2-attr", "l2-scene", "all"}] * 2
    assert "| circular % |" in capsys.readouterr().out
    assert records[0]["data"] == data and records[0]["n"] == 6
    for option in ("0", "-1"):
        with pytest.raises(SystemExit):
            command(monkeypatch, eval_main.main, "run", "full", *options, "--max-new-tokens", option)
        assert f"--max-new-tokens is {option}; it must be at least 1" in capsys.readouterr().err


def broken_vqav2(made, tmp_path, content):
    data = made("vqav2")
    image = tmp_path / "vqav2" / "val2014" / "COCO_val2014_000000393225.jpg"
    if content is None:
        image.unlink()
    else:
        image.write_bytes(content)
    return data


@pytest.mark.parametrize(
    ("content", "words"), [(b"no image", "cannot be decoded"), (b"", "cannot be decoded"), (None, "does not exist")]
)
@pytest.mark.slow
def test_images_that_fail_are_skipped_counted_and_named_or_refused(
    monkeypatch, place, made, tmp_path, capsys, content, words
):
    data, out = broken_vqav2(made, tmp_path, content), tmp_path / "records.json"
    run = ["run", "full", "--backbone", place / "vlm", "--data", data, "--json", out]
    command(monkeypatch, eval_main.main, *run)
    (record,) = json.loads(out.read_text())
    assert (record["n"], record["failed"]) == (2, 1) and set(record["parts"]) == {"other", "number", "all"}
    said = capsys.readouterr().err
    assert (
        "query '393225000' failed: image " in said
        and f"COCO_val2014_000000393225.jpg of query '393225000' {words}" in said
    )
    with pytest.raises(SystemExit) as caught:
        command(monkeypatch, eval_main.main, *run, "--strict")
    assert caught.value.code == 2 and words in capsys.readouterr().err.splitlines()[-1]


def test_base64_that_is_none_fails_its_own_query_only(small, made, tmp_path):
    data = made("mmbench")
    file = tmp_path / "mmbench" / "mmbench_dev_20230712.tsv"
    lines = file.read_text().split("\n")
    lines[-2] = lines[-2].replace("iVBORw0KGgo", "no base 64!")
    file.write_text("\n".join(lines))
    bank = EncodingBank(small, load_queries(data, "test"))
    _, valid, failed = bank.gather_valid(range(6))
    assert valid == [0, 1, 2, 3, 4] and "query '1000252' cannot be decoded" in failed[5]


def test_answers_are_cut_where_the_scoring_has_them_cut(small, made, monkeypatch):
    queries = load_queries(made("vqav2"), "test")
    cut = []
    answer = type(small).answer
    monkeypatch.setattr(
        type(small), "answer", lambda self, *args, **kw: (cut.append(args[2]), answer(self, *args, **kw))[1]
    )
    bank = EncodingBank(small, queries)
    evaluate(FullPlanner(small), small, bank, (1.0,), progress=False)
    evaluate(FullPlanner(small), small, bank, (1.0,), progress=False, max_new_tokens=3)
    assert cut == [16, 3]
    assert MaskingCore(small, queries).max_new_tokens == 16
    assert MaskingCore(small, queries, max_new_tokens=2).max_new_tokens == 2


@pytest.mark.parametrize(
    ("script", "own"),
    [(train_rl, "--envs 8 --rollout-steps 2 --batch-size 8"), (train_gumbel, "--batch-size 8")],
    ids=["rl", "gumbel"],
)
@pytest.mark.slow
def test_controllers_train_on_a_benchmark(monkeypatch, place, tmp_path, script, own, capsys):
    for part in ("train2014", "val2014"):
        benchmark_files.vqav2(tmp_path / "vqav2", part)
    out = tmp_path / "run"
    sizes = "--total-queries 64 --test-queries 3 --validate-every 32 --validate-queries 3 --width 8 --budgets 0.6 1.0"
    sizes = f"{sizes} --test-budgets 0.6 {own}".split()
    where = ["--backbone", place / "vlm", "--data", f"vqav2:root={tmp_path / 'vqav2'}", "--out", out]
    command(monkeypatch, script.main, *sizes, *where)
    records = json.loads((out / "result.json").read_text())
    assert all(set(record["parts"]) == {"other", "number", "yes/no", "all"} for record in records)
    assert all(
        0 <= line["accuracy"] <= 1
        for line in map(json.loads, (out / "metrics.jsonl").read_text().splitlines())
        if "accuracy" in line
    )
    assert "| part " in capsys.readouterr().out


@pytest.mark.slow
def test_streaming_holds_no_texts(tmp_path, monkeypatch):
    """5,000 questions with ten answers each take more than 4 MB as Python objects."""
    monkeypatch.setattr(reading, "CHUNK", 1 << 14)
    write_vqav2(tmp_path, 5_000)
    queries = load_queries(f"vqav2:root={tmp_path}", "validation")
    assert len(queries) == 5_000
    arrow = pa.total_allocated_bytes()
    tracemalloc.start()
    for number in range(len(queries)):
        queries.text(number)
    streamed = tracemalloc.get_traced_memory()[1]
    held = [queries.text(number) for number in range(len(queries))]
    taken = tracemalloc.get_traced_memory()[0]
    tracemalloc.reset_peak()
    before = tracemalloc.get_traced_memory()[0]
    read = sum(1 for _ in reading.json_entries(tmp_path / "v2_mscoco_val2014_annotations.json", "annotations"))
    reading_peak = tracemalloc.get_traced_memory()[1] - before
    tracemalloc.stop()
    assert len(held) == read == 5_000 and taken > 4e6
    assert streamed < 0.3e6 and reading_peak < 0.3e6 and pa.total_allocated_bytes() - arrow < 0.3e6
