"""What ``results/scenes`` says follows from its records, and these from its controllers."""

import csv
import json
import re
from pathlib import Path

import numpy as np
import pytest

from backbones import EncodingBank
from envs import load_queries
from eval.evaluate import outcomes_met
from eval.experiment.arms import EXPERIMENTS, Prepared
from eval.experiment.cells import fill, lay_out
from eval.experiment.claims import answers, pairs
from eval.experiment.summary import collect, comparisons, estimates
from eval.experiment.tables import accuracy_table, comparison_table, cost_table
from eval.policies import load_planner

SCENES = Path(__file__).parent.parent / "results" / "scenes"
HEAD = json.loads((SCENES / "experiment.json").read_text())
REPORTS = sorted(file.parent.name for file in SCENES.glob("*/tables.md"))
FEW = 200


@pytest.fixture(scope="module")
def queries():
    return load_queries(HEAD["data"], "test").spread(HEAD["test_queries"])


def cells_of(name):
    seeds = sorted({int(folder.name.removeprefix("seed-")) for folder in SCENES.glob("cells/*/seed-*")})
    tuning = SCENES / "tuning.json"
    tuned = json.loads(tuning.read_text())["best"] if tuning.is_file() else {}
    return lay_out(SCENES, EXPERIMENTS[name](Prepared(tuned, SCENES / "static.json")), seeds)


@pytest.mark.parametrize("name", ["static, merged", "rl", "gumbel"])
def test_a_cell_is_had_again_from_its_run(tiny, queries, name):
    cells = cells_of("training")
    (cell,) = (cell for cell in cells if (cell.arm.name, cell.seed) == (name, 0))
    planner = load_planner(fill(cell.arm.policy, cell, cells), tiny, 0)
    bank = EncodingBank(tiny, queries.head(FEW))
    (found,), _ = outcomes_met(planner, tiny, bank, (0.25,), 0, progress=False)
    stored = {column: values[:FEW] for column, values in cell.outcomes().items()}
    # another processor may round otherwise, and a query that was undecided may turn
    assert np.mean(found.columns["accuracy"] != stored["accuracy@0.25"]) <= 0.01
    assert found.columns["llm_flops_ratio"] == pytest.approx(stored["llm_flops_ratio@0.25"], abs=0.02)


@pytest.mark.parametrize("name", REPORTS)
def test_tables_follow_from_records(queries, name):
    budgets, cells = HEAD["budgets"], cells_of(name)
    results = collect(cells)
    written = (SCENES / name / "tables.md").read_text()
    assert accuracy_table(results, estimates(results, queries.kinds), budgets).markdown() in written
    compared = comparisons(results, pairs(name), budgets)
    assert comparison_table(compared).markdown() in written
    for answer in answers(name, results, compared, budgets):
        assert f"- **{answer.question}** {answer.text}\n" in written
    assert cost_table(results, budgets).markdown() in written
    records = [record for cell in cells if cell.done for record in cell.records() if record.get("budgeted")]
    assert records and not any(record["budget_violations"] for record in records)


TABLE = re.compile(r"<!-- (?P<file>results/\S+\.csv) -->\n\n\|.*\n\| ---.*\n(?P<rows>(?:\|.*\n)+)")


@pytest.mark.parametrize("page", ["README.md", "docs/results.md"])
def test_tables_of_pages_are_those_of_reports(page):
    """Row by row, but for what a policy is called there."""
    root = SCENES.parent.parent
    tables = list(TABLE.finditer((root / page).read_text()))
    assert len(tables) == (root / page).read_text().count(".csv -->") >= 3
    for table in tables:
        with (root / table["file"]).open() as file:
            reported = [
                [row["seeds"], *(cell for name, cell in row.items() if name.startswith("at ")), row["area"]]
                for row in csv.DictReader(file)
            ]
        for line in table["rows"].splitlines():
            _, *cells = [cell.strip() for cell in line.strip("|").split("|")]
            assert cells in reported, line
