"""What ``AdaptiveVLM.save_pretrained`` wrote as a policy of ``python -m maskgym.eval``."""

import json
import shutil

import pytest

import maskgym.eval.__main__ as eval_main
from maskgym import AdaptiveVLM
from maskgym.backbones import load_backbone
from maskgym.envs import load_queries
from maskgym.eval.demo.comparison import Comparison
from maskgym.eval.policies import backbone_of
from tests.conftest import build, command
from tests.hostile import a_run, edit


@pytest.fixture(scope="module")
def made(place, tmp_path_factory):
    """A run, what was saved of it with its VLM and without, and without but with an option of the VLM."""
    folder = tmp_path_factory.mktemp("made")
    run = a_run(folder / "run", place / "vlm")
    AdaptiveVLM.from_pretrained(run).save_pretrained(folder / "whole")
    AdaptiveVLM.from_pretrained(run).save_pretrained(folder / "named", with_backbone=False)
    priced = load_backbone(str(place / "vlm"), expected_answer_tokens=8)
    AdaptiveVLM.from_pretrained(run, priced).save_pretrained(folder / "priced", with_backbone=False)
    return folder


def records(monkeypatch, place, tmp_path, *arguments):
    where = ["--data", place / "data", "--budgets", "0.6", "--json", tmp_path / "records.json"]
    command(monkeypatch, eval_main.main, "run", *arguments, *where)
    return json.loads((tmp_path / "records.json").read_text())


def figures(record):
    return {name: value for name, value in record.items() if name not in ("policy", "backbone")}


@pytest.mark.slow
def test_it_is_evaluated_as_its_run_is(monkeypatch, place, tmp_path, made):
    policies = [str(made / "{}"), f"{made / '{}'}@merge", f"stride@0.5 then {made / '{}'}"]
    of_run = records(monkeypatch, place, tmp_path, *(policy.format("run") for policy in policies))
    saved = records(monkeypatch, place, tmp_path, *(policy.format("whole") for policy in policies))
    assert [figures(record) for record in saved] == [figures(record) for record in of_run]
    assert [record["policy"] for record in saved] == ["whole", "whole@merge", "stride@0.5 then whole"]
    assert {record["backbone"] for record in saved} == {str(made / "whole" / "model")}
    vlm = place / "vlm"
    beside = records(monkeypatch, place, tmp_path, made / "run", made / "whole", made / "named", "--backbone", vlm)
    assert [figures(record) for record in beside] == [figures(of_run[0])] * 3


@pytest.mark.slow
def test_the_options_of_its_vlm_are_kept(monkeypatch, place, tmp_path, made):
    """The null: without them the plans have another price."""
    queries = load_queries(str(place / "data"), "test")
    vlm = AdaptiveVLM.from_pretrained(made / "priced", str(place / "vlm"))
    shown = [queries[number] for number in range(len(queries))]
    replies = vlm.generate([query.image for query in shown], [query.question for query in shown], 0.6)
    ratios = {}
    for name in ("named", "priced"):
        (record,) = records(monkeypatch, place, tmp_path, made / name, "--backbone", place / "vlm")
        ratios[name] = record["llm_flops_ratio"]
    mean = sum(reply.llm_flops_ratio for reply in replies) / len(replies)
    assert ratios["priced"] == pytest.approx(mean) and abs(ratios["named"] - mean) > 1e-4


def test_the_page_shows_it(place, made):
    name, options = backbone_of([str(made / "priced")], str(place / "vlm"))
    assert (name, options["expected_answer_tokens"]) == (str(place / "vlm"), 8)
    assert Comparison(str(made / "whole"), load_backbone(name)).policy.name == "whole"


REFUSED = {
    "another VLM": ("{whole} --backbone {other}", "trained for other weights"),
    "another VLM, by its name": ("{whole} --backbone {other}", "saved for the backbone '{whole}/model'; name that one"),
    "a VLM of another shape": ("{whole} --backbone tiny", "it was saved for the backbone '{whole}/model'; name that"),
    "a VLM that lies elsewhere": ("{named}", "if you trust that place, name it yourself as the backbone"),
    "its run beside it": ("{run} {whole}", "or, where these are copies of one, name it by --backbone"),
    "other options beside it": ("{whole} {priced}", "were saved with different options of the backbone"),
    "odd options": ("{odd}", "was saved with unusable options, {{'name': 'x'}}"),
    "no controller": ("{empty}", "no readable controller in '{empty}'"),
    "no description": ("{torn}", "adaptive.json' is not readable"),
    "neither": ("{nothing}", "is neither a run folder (no config.yaml) nor what save_pretrained wrote"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_does_not_fit_is_refused(monkeypatch, place, tmp_path, made, capsys, case):
    other = build(seed=1)
    other.model.save_pretrained(tmp_path / "other")
    other.processor.save_pretrained(tmp_path / "other")
    for name in ("odd", "empty", "torn"):
        shutil.copytree(made / "whole", tmp_path / name)
    edit(tmp_path / "odd" / "adaptive.json", backbone_options={"name": "x"})
    (tmp_path / "empty" / "controller.json").unlink()
    (tmp_path / "torn" / "adaptive.json").write_text("{")
    (tmp_path / "nothing").mkdir()
    at = {path.name: path for folder in (made, tmp_path) for path in folder.iterdir()}
    line, words = REFUSED[case]
    with pytest.raises(SystemExit) as caught:
        records(monkeypatch, place, tmp_path, *line.format(**at).split())
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert caught.value.code == 2 and error.startswith("error: ") and words.format(**at) in error
