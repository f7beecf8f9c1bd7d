"""``python -m maskgym.eval run`` with shares of the tokens and layouts, and ``python -m maskgym.eval tune``."""

import json

import pytest

import maskgym.eval.__main__ as eval_main
from maskgym.backbones import EncodingBank
from maskgym.eval.measure.evaluate import evaluate
from maskgym.eval.measure.latency import measure
from maskgym.eval.policies import load_planner
from maskgym.eval.studies.tune import GRID, baseline_of, best_settings, read_grid
from maskgym.policies.static import STATIC
from tests.conftest import command


def run(monkeypatch, place, tmp_path, *arguments):
    where = ["--backbone", place / "vlm", "--data", place / "data", "--json", tmp_path / "records.json"]
    command(monkeypatch, eval_main.main, *arguments, *where)
    return json.loads((tmp_path / "records.json").read_text())


def test_shares_of_the_tokens_make_a_record_each(monkeypatch, place, tmp_path, capsys):
    policies = ["full", "stride", "fastv:k=1", "prumerge"]
    records = run(monkeypatch, place, tmp_path, "run", *policies, "--keep", "0.5", "0.25", "--plot", tmp_path / "a.png")
    found = [(record["policy"], record.get("keep"), record["kept_tokens"]) for record in records]
    assert found[:5] == [
        ("full", None, 16),
        ("stride", 0.5, 8),
        ("stride", 0.25, 4),
        ("fastv:k=1", 0.5, (16 + 8 + 8) / 3),
        ("fastv:k=1", 0.25, (16 + 4 + 4) / 3),
    ]
    assert found[5][:2] == ("prumerge", None) and len(found) == 6
    assert all(record["budget_violations"] == 0 for record in records)
    assert "| keep |" in capsys.readouterr().out.replace("  ", " ")


def test_what_a_policy_cannot_meet_is_left_out_and_the_others_go_on(monkeypatch, place, tmp_path, capsys):
    """One of three layers runs on all tokens, so a mean of 0.3 of them is not to be had."""
    records = run(monkeypatch, place, tmp_path, "run", "pyramiddrop:layers=1", "stride", "--keep", "0.3")
    assert [record["policy"] for record in records] == ["stride"]
    assert "is left out: a share of 0.3 of the visual tokens" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        run(monkeypatch, place, tmp_path, "run", "pyramiddrop:layers=1", "--keep", "0.3")
    assert "error: a share of 0.3 of the visual tokens" in capsys.readouterr().err


def test_layouts_are_for_all_policies_but_full(monkeypatch, place, tmp_path):
    options = ["full", "stride", "divprune@original", "--budgets", "0.8", "--merge", "--positions", "renumbered"]
    records = run(monkeypatch, place, tmp_path, "run", *options)
    assert [record["policy"] for record in records] == ["full", "stride@merge@renumbered", "divprune@original"]


def test_chains_and_charges_reach_the_records(monkeypatch, place, tmp_path):
    policies = ["visionzip", "stride@0.5 then random-layers", "--budgets", "0.6", "0.8"]
    records = run(monkeypatch, place, tmp_path, "run", *policies)
    assert [record["policy"] for record in records] == ["visionzip"] * 2 + ["stride@0.5 then random-layers"] * 2
    assert all(record["budget_violations"] == 0 and record["llm_flops_ratio"] <= record["budget"] for record in records)
    assert records[2]["kept_tokens"] == 8


def test_timing_asks_the_tower_only_what_the_planner_reads(small, source):
    planner = load_planner("visionzip", small, 0)
    small.listen(small.family.signals)
    asked = []
    listening = small.family.observe
    small.family.observe = lambda batch, signals: (asked.append(tuple(signals)), listening(batch, signals))[1]
    try:
        measure(small, planner, [[source[0]]], 0.8, new_tokens=1, repeats=1, warm_up=0)
        measure(small, load_planner("stride", small, 0), [[source[0]]], 0.8, new_tokens=1, repeats=1, warm_up=0)
    finally:
        del small.family.observe
    assert asked == [("cls-features",), ()] and small.signals == set(small.family.signals)


def test_a_rules_selection_is_in_its_flops(small, source):
    """DivPrune compares all tokens; stride compares none."""
    bank = EncodingBank(small, source)
    shares = {}
    for policy in ("divprune@0.5", "stride@0.5@renumbered"):
        shares[policy] = evaluate(load_planner(policy, small, 0), small, bank, (1.0,), progress=False)[0]
    extra = shares["divprune@0.5"]["llm_flops_ratio"] - shares["stride@0.5@renumbered"]["llm_flops_ratio"]
    encoding = bank.gather([0, 1])
    expected = (2 * 16 * 16 * 32 / small.full_llm_flops(encoding).double()).mean()
    assert extra == pytest.approx(float(expected), rel=1e-4)


def test_tuning_names_the_best_setting_of_each_baseline(monkeypatch, place, tmp_path, capsys):
    settings = ["stride", "stride@merge", "fastv:k=1", "fastv:k=2", "fastv:k=7", "--budgets", "0.9", "0.95"]
    written = run(monkeypatch, place, tmp_path, "tune", *settings, "--split", "test")[0]
    printed = capsys.readouterr().out
    assert "fastv:k=7 is left out: fastv: k is 7" in printed and "best: python -m maskgym.eval run" in printed
    assert set(written["best"]) == {"stride", "fastv"} and len(written["records"]["stride@merge"]) == 2
    for baseline, setting in written["best"].items():
        own = {
            policy: sum(record["accuracy"] for record in records)
            for policy, records in written["records"].items()
            if baseline_of(policy) == baseline and records
        }
        assert own[setting] == max(own.values())


def test_settings_evaluated_in_part_are_no_candidates():
    records = {
        "fastv:k=1": [{"accuracy": 0.5}, {"accuracy": 0.6}],
        "fastv:k=2": [{"accuracy": 0.9}],
        "prumerge@mean-attention:count=budget": [{"accuracy": 0.1}],
    }
    assert best_settings(records) == {
        "fastv": "fastv:k=1",
        "prumerge@mean-attention": "prumerge@mean-attention:count=budget",
    }


def test_the_shipped_grid_is_of_known_baselines(tiny):
    settings = read_grid(GRID)
    assert len(settings) > 40 and len(set(settings)) == len(settings)
    for setting in settings:
        assert load_planner(setting, tiny, 0).budgeted
    tuned = {baseline_of(setting) for setting in settings}
    assert tuned >= {name for name in STATIC if name != "static" and "@" not in name}


BAD = [
    ("run stride --keep 0", r"a share of 0 of the visual tokens is outside (0, 1]"),
    ("run random --keep 0.5", "policy 'random' does not choose visual tokens by count"),
    ("run stride --keep 0.5 --milliseconds 3 --latency-model x", "--keep and --milliseconds both stand in place"),
    ("run fastv:k=1 --merge --budgets 0.9", "policy 'fastv:k=1' drops visual tokens inside the decoder"),
    ("run fastv:k=1 --budgets 0.1", "its first layer runs on all visual tokens; the least budget here is"),
    ("tune --grid nowhere.txt", "--grid 'nowhere.txt' cannot be read"),
    ("tune --grid {empty}", "has no settings; write one a line"),
]


@pytest.mark.parametrize(("line", "words"), BAD)
def test_bad_requests_end_with_status_2_and_one_line(monkeypatch, place, tmp_path, capsys, line, words):
    (tmp_path / "empty.txt").write_text("# nothing\n")
    where = ["--backbone", place / "vlm", "--data", place / "data"]
    with pytest.raises(SystemExit) as caught:
        command(monkeypatch, eval_main.main, *line.format(empty=tmp_path / "empty.txt").split(), *where)
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert caught.value.code == 2 and error.startswith("error: ") and words in error
