import pytest
import torch

from maskgym.backbones import EncodingBank
from maskgym.eval.bench.table import bench_table, entry
from maskgym.eval.measure.evaluate import evaluate
from maskgym.eval.measure.report import plot_tradeoff, plot_training, table
from maskgym.policies.baselines import FullPlanner, RandomPlanner
from maskgym.policies.controller.learned import ControllerPlanner
from maskgym.policies.controller.network import ControllerConfig, TwoLevelController


@pytest.fixture(scope="module")
def records(small, source):
    bank = EncodingBank(small, source)
    torch.manual_seed(0)
    controller = TwoLevelController(ControllerConfig.for_layout(small.layout, small.hidden, width=8))
    planners = [FullPlanner(small), RandomPlanner(small), ControllerPlanner(controller, small, "rl")]
    return [
        record
        for planner in planners
        for record in evaluate(planner, small, bank, (0.6, 1.0), batch_size=5, progress=False)
    ]


def test_records_have_what_users_rely_on(records):
    keys = {
        "policy",
        "backbone",
        "data",
        "split",
        "budget",
        "seed",
        "n",
        "accuracy",
        "accuracy_stderr",
        "llm_flops_ratio",
        "total_flops_ratio",
        "budget_violations",
        "kept_tokens",
        "kept_heads",
        "kept_layers",
    }
    assert all(keys <= set(record) for record in records)
    assert [(record["policy"], record["budget"]) for record in records] == [
        ("full", 1.0),
        ("random", 0.6),
        ("random", 1.0),
        ("rl", 0.6),
        ("rl", 1.0),
    ]
    assert all(record["n"] == 12 and record["budget_violations"] == 0 for record in records)


def test_full_is_full_and_the_others_keep_to_their_budget(records):
    full = records[0]
    assert full["llm_flops_ratio"] == full["total_flops_ratio"] == 1
    assert (full["kept_tokens"], full["kept_heads"], full["kept_layers"]) == (16, 12, 3)
    assert all(record["llm_flops_ratio"] <= record["budget"] for record in records)
    assert all(record["total_flops_ratio"] > record["llm_flops_ratio"] for record in records if record["budget"] < 1)


def test_batch_size_changes_nothing(small, source):
    bank = EncodingBank(small, source)
    planner = FullPlanner(small)
    one, all_at_once = (evaluate(planner, small, bank, (1.0,), batch_size=size, progress=False) for size in (1, 100))
    assert one == all_at_once


def test_violations_are_counted(small, source):
    planner = FullPlanner(small)
    planner.budgeted = True
    record = evaluate(planner, small, EncodingBank(small, source), (0.5,), progress=False)[0]
    assert record["budget_violations"] == 12 and record["llm_flops_ratio"] == 1


@pytest.mark.slow
def test_tables_and_plots(records, tmp_path):
    lines = table(records).splitlines()
    assert len(lines) == 2 + len(records) and len({len(line) for line in lines}) == 1
    plot_tradeoff(records, tmp_path / "a.png")
    validation = {"0.6": {"accuracy": 0.5}}
    plot_training([{"queries": 10, "reward": 0.1}, {"queries": 10, "validation": validation}], tmp_path / "b.png")
    plot_training([], tmp_path / "c.png")
    assert all((tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG") for name in "abc")


def test_bench_entries_name_their_goal():
    made = entry("env_over_forward", 0.951234, "here")
    assert made == {"name": "env_over_forward", "value": 0.951, "goal": 0.95, "better": "higher", "setting": "here"}
    assert "≥ 0.9" in bench_table([made])
