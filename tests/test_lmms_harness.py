"""The plug-in in lmms-eval itself: found by its registry, given its requests, and scored by its command line."""

import json
import os
import subprocess
import sys
import tomllib
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest

from maskgym.common.errors import InputError
from tests.test_lmms import DOCUMENTS, OPTIONS, ROWS, run, visual

lmms_eval = pytest.importorskip(
    "lmms_eval.api.instance", reason="lmms-eval is not installed here", exc_type=ImportError
)

__all__ = ["run"]

ROOT = Path(__file__).parent.parent
GROUP = "lmms_eval.models"
DECLARED = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["entry-points"][GROUP]

TASK = """
task: {task}
dataset_path: parquet
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
output_type: {kind}
doc_to_visual: !function functions.visual
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{answers[0]}}}}"
"""
GENERATED = """
generation_kwargs: {max_new_tokens: 3, temperature: 0, do_sample: false, until: ["ASSISTANT:"]}
process_results: !function functions.scored
metric_list: [{metric: letters, aggregation: mean, higher_is_better: true}]
"""
CHOSEN = """
doc_to_choice: ["red", "yes", "blue", "no"]
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]
"""
FUNCTIONS = """
def visual(doc):
    return [doc["image"]]


def scored(doc, results):
    return {"letters": len(results[0])}
"""


@pytest.fixture(scope="module")
def model_class():
    from lmms_eval.models.registry_v2 import ModelRegistryV2

    registry = ModelRegistryV2()
    payload = EntryPoint("maskgym", DECLARED["maskgym"], GROUP).load()
    registry.register_manifest(payload())
    return registry.get_model_class("maskgym")


@pytest.fixture
def model(model_class, run):
    model = model_class.create_from_arg_string(f"pretrained={run},budget=0.6", {"batch_size": "2", "device": "cpu"})
    model.task_dict = DOCUMENTS
    return model


def instance(kind, doc_id, second):
    arguments = (ROWS[doc_id]["question"], second, visual, doc_id, "made", "test")
    return lmms_eval.Instance(kind, arguments, 0, {"task": "made", "doc_id": doc_id, "repeats": 1})


def test_manifest_resolves_to_the_model(model_class):
    from lmms_eval.api.model import lmms

    assert issubclass(model_class, lmms) and model_class.is_simple and model_class.__name__ == "MaskGym"


def test_generated_results_carry_what_they_took(model):
    results = model.generate_until([instance("generate_until", row, dict(OPTIONS)) for row in range(3)])
    for result in results:
        text, counts = lmms_eval.unwrap_generation_output(result)
        assert isinstance(text, str) and counts.to_dict()["output_tokens"] == 5
        assert counts.to_dict()["llm_flops_ratio"] <= counts.to_dict()["budget"] == 0.6


def test_scores_are_pairs_for_callers_and_for_the_evaluator(model):
    results = model.loglikelihood([instance("loglikelihood", row, " is there a") for row in range(3)])
    for result in results:
        loss, greedy = result
        assert loss > 0 and greedy is False and result == (loss, greedy)
        assert lmms_eval.unwrap_generation_output(result)[0] == (loss, greedy)


def test_tasks_of_several_rounds_are_refused(model):
    with pytest.raises(NotImplementedError, match="tasks of several rounds are not supported"):
        model.generate_until_multi_round([])


def test_options_are_refused_by_the_model(model_class):
    with pytest.raises(InputError, match="unknown option 'bugdet'"):
        model_class.create_from_arg_string("pretrained=x,bugdet=0.5")


@pytest.fixture
def harness(tmp_path):
    """Its command line, where a task of each kind and the installed package's entry point are found."""
    (tmp_path / "functions.py").write_text(FUNCTIONS)
    ROWS.to_parquet(str(tmp_path / "rows.parquet"))
    for task, kind, more in (("made", "generate_until", GENERATED), ("chosen", "multiple_choice", CHOSEN)):
        text = TASK.format(task=task, kind=kind, file=tmp_path / "rows.parquet") + more
        (tmp_path / f"{task}.yaml").write_text(text)
    metadata = tmp_path / "site" / "maskgym-0.dist-info"
    metadata.mkdir(parents=True)
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: maskgym\nVersion: 0\n")
    (metadata / "entry_points.txt").write_text(f"[{GROUP}]\nmaskgym = {DECLARED['maskgym']}\n")
    places = {"PYTHONPATH": f"{tmp_path / 'site'}{os.pathsep}{ROOT}", "HF_DATASETS_CACHE": str(tmp_path / "cache")}

    def score(model_args, out):
        line = f"-m lmms_eval --model maskgym --model_args {model_args} --tasks made,chosen --include_path {tmp_path} "
        line += f"--batch_size 4 --output_path {out} --log_samples --verbosity DEBUG"
        environment = {**os.environ, **places, "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
        done = subprocess.run(
            [sys.executable, *line.split()], env=environment, capture_output=True, text=True, cwd=tmp_path
        )
        assert done.returncode == 0, done.stdout + done.stderr
        (results,) = out.rglob("*_results.json")
        samples = {
            task: [
                json.loads(row)
                for path in out.rglob(f"*_samples_{task}.jsonl")
                for row in path.read_text().splitlines()
            ]
            for task in ("made", "chosen")
        }
        return json.loads(results.read_text()), samples

    return score


def test_the_command_line_scores_each_budget_after_one_load(harness, run, tmp_path):
    """Answered under two budgets, the first scored; then the second from the records: both scores are those of the
    records, and results and samples have what the answers took."""
    file = tmp_path / "out" / "records.jsonl"
    sides = {
        0.6: harness(f"pretrained={run},budget=0.6-1.0,records={file}", tmp_path / "out"),
        1.0: harness(f"answers={file},budget=1.0", tmp_path / "again"),
    }
    records = [json.loads(line) for line in file.read_text().splitlines()]
    assert len(records) == 2 * (12 + 12 * 4)
    for budget, (results, samples) in sides.items():
        own = [record for record in records if record["budget"] == budget]
        made = [record for record in own if record["task"] == "made"]
        scored = results["results"]["made"]["letters,none"]
        assert scored == pytest.approx(sum(len(record["answer"]) for record in made) / 12)
        for record, sample in zip(made, samples["made"], strict=True):
            assert sample["filtered_resps"] == record["answer"]
            assert sample["token_counts"][0]["llm_flops_ratio"] == record["llm_flops_ratio"] <= budget
        right = 0
        for row in range(12):
            choices = [record for record in own if (record["task"], record["doc_id"]) == ("chosen", row)]
            best = max(choices, key=lambda record: record["log_likelihood"] / record["new_tokens"])
            right += best["answer"] == ROWS[row]["answers"][0]
        assert results["results"]["chosen"]["acc,none"] == pytest.approx(right / 12)
        assert f"avg_llm_flops_ratio@{budget:g}" in results["throughput"]
        assert results["throughput"][f"avg_kept_layers@{budget:g}"] <= 3
