"""What committed experiments say follows from their records, and these from their controllers; pages say the same."""

import csv
import json
import re
from pathlib import Path

import numpy as np
import pytest

from maskgym.backbones import EncodingBank
from maskgym.envs import load_queries
from maskgym.eval.experiment.arms import EXPERIMENTS, Prepared
from maskgym.eval.experiment.cells import fill, lay_out
from maskgym.eval.experiment.claims import answers, pairs
from maskgym.eval.experiment.summary import collect, comparisons, estimates, images_of
from maskgym.eval.experiment.tables import accuracy_table, comparison_table, convergence_table, cost_table
from maskgym.eval.measure.evaluate import outcomes_met
from maskgym.eval.policies import load_planner

ROOT = Path(__file__).parent.parent
REPORTS = sorted(file.parent for file in ROOT.glob("results/*/*/tables.md"))
PAGES = {"README.md": (1, 4), "docs/results.md": (3, 6)}
"""By page, how many tables and differences it has at least."""
FEW = 200


def head_of(folder):
    return json.loads((folder / "experiment.json").read_text())


def queries_of(folder):
    head = head_of(folder)
    return load_queries(head["data"], "test").spread(head["test_queries"])


def cells_of(folder, name):
    seeds = sorted({int(path.name.removeprefix("seed-")) for path in folder.glob("cells/*/seed-*")})
    tuning = folder / "tuning.json"
    tuned = json.loads(tuning.read_text())["best"] if tuning.is_file() else {}
    return lay_out(folder, EXPERIMENTS[name](Prepared(tuned, folder / "static.json")), seeds)


@pytest.mark.parametrize(
    ("name", "arm"),
    [("training", "static, merged"), ("training", "rl"), ("training", "gumbel"), ("dimensions", "rl heads")],
)
def test_a_cell_is_had_again_from_its_run(tiny, name, arm):
    scenes = ROOT / "results" / "scenes"
    cells = cells_of(scenes, name)
    (cell,) = (cell for cell in cells if (cell.arm.name, cell.seed) == (arm, 0))
    planner = load_planner(fill(cell.arm.policy, cell, cells), tiny, 0)
    bank = EncodingBank(tiny, queries_of(scenes).head(FEW))
    (found,), _ = outcomes_met(planner, tiny, bank, (0.25,), 0, progress=False)
    stored = {column: values[:FEW] for column, values in cell.outcomes().items()}
    # another processor may round otherwise, and a query that was undecided may turn
    assert np.mean(found.columns["accuracy"] != stored["accuracy@0.25"]) <= 0.01
    assert found.columns["llm_flops_ratio"] == pytest.approx(stored["llm_flops_ratio@0.25"], abs=0.02)


@pytest.mark.parametrize("report", REPORTS, ids=lambda report: f"{report.parent.name}-{report.name}")
@pytest.mark.slow
def test_tables_follow_from_records(report):
    budgets, cells = head_of(report.parent)["budgets"], cells_of(report.parent, report.name)
    results, queries = collect(cells), queries_of(report.parent)
    written = (report / "tables.md").read_text()
    assert accuracy_table(results, estimates(results, queries.kinds), budgets).markdown() in written
    compared = comparisons(results, pairs(report.name), budgets, images_of(queries))
    assert comparison_table(compared).markdown() in written
    for answer in answers(report.name, results, compared, budgets):
        assert f"- **{answer.question}** {answer.text}\n" in written
    assert cost_table(results, budgets).markdown() in written
    assert convergence_table(results, budgets).markdown() in written
    records = [record for cell in cells if cell.done for record in cell.records() if record.get("budgeted")]
    assert records and not any(record["budget_violations"] for record in records)


TABLE = re.compile(r"<!-- (?P<file>results/\S+\.csv) -->\n\n\|.*\n\| ---.*\n(?P<rows>(?:\|.*\n)+)")


@pytest.mark.parametrize("page", PAGES)
def test_tables_of_pages_are_those_of_reports(page):
    """Row by row, but for what a policy is called there."""
    tables = list(TABLE.finditer((ROOT / page).read_text()))
    assert len(tables) == (ROOT / page).read_text().count(".csv -->") >= PAGES[page][0]
    for table in tables:
        with (ROOT / table["file"]).open() as file:
            reported = [
                [row["seeds"], *(cell for name, cell in row.items() if name.startswith("at ")), row["area"]]
                for row in csv.DictReader(file)
            ]
        for line in table["rows"].splitlines():
            _, *cells = [cell.strip() for cell in line.strip("|").split("|")]
            assert cells in reported, line


DIFFERENCE = re.compile(r"([+-]?\d+\.\d\d)\s(?:points\s)?\[([+-]?\d+\.\d\d),\s([+-]?\d+\.\d\d)\]")


@pytest.mark.parametrize("page", PAGES)
def test_differences_of_pages_are_those_of_reports(page):
    """A figure with its interval, whatever is said around it."""
    reported = set()
    for file in ROOT.glob("results/*/*/paired.csv"):
        with file.open() as opened:
            reported |= {tuple(map(float, DIFFERENCE.search(row[3]).groups())) for row in list(csv.reader(opened))[1:]}
    said = [tuple(map(float, found.groups())) for found in DIFFERENCE.finditer((ROOT / page).read_text())]
    assert len(said) >= PAGES[page][1] and set(said) <= reported, set(said) - reported


SPEED = re.compile(r"^\| ([a-z-]+) \| (\d+) \[(\d+), (\d+)\] \| ([\d,]+) \|$", re.MULTILINE)


def test_speeds_of_trainings_are_those_of_their_records():
    rows = SPEED.findall((ROOT / "docs" / "trainings.md").read_text())
    assert len(rows) >= 8
    for arm, *stated in rows:
        files = ROOT.glob(f"results/scenes/cells/{arm}/seed-*/run/timing.jsonl")
        ends = [json.loads(file.read_text().splitlines()[-1]) for file in files]
        speeds = [end["queries"] / end["seconds"] for end in ends]
        figures = [np.median(speeds), min(speeds), max(speeds), max(end["peak_memory_mb"] for end in ends)]
        assert stated == [f"{figure:,.0f}" for figure in figures] and len(ends) == 5, arm
