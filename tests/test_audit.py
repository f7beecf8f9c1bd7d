"""Controls that take from a policy what it claims to use."""

import json

import numpy as np
import pytest
import torch

import maskgym.eval.__main__ as eval_main
from maskgym.backbones import EncodingBank
from maskgym.backbones.plans.masks import Masks
from maskgym.envs import load_queries
from maskgym.eval.studies.audit import SIDE, audit, relevance_table, swapped
from tests.conftest import command


class Looking:
    """Keeps the tokens that matter, and is told which by whoever made it."""

    name, budgeted = "looking", True

    def __init__(self, backbone, queries, look=True):
        self.backbone, self.queries, self.look = backbone, queries, look
        self.number = {queries.text(number)[0]: number for number in range(len(queries))}

    def plan(self, encoding, budgets_B):
        full = self.backbone.full(encoding)
        tokens = torch.zeros_like(full.tokens)
        for row, id in enumerate(encoding.ids):
            cells = self.queries.patches[self.number[id]] if self.look else range(8)
            tokens[row, list(cells)] = True
        return Masks(tokens, full.heads, full.layers)

    def controller_flops(self, encoding):
        return 0


class Following:
    """Keeps tokens by the brightness of what it sees, and layers by the question's length: depends on both."""

    name, budgeted = "following", True

    def __init__(self, backbone):
        self.backbone, self.seen = backbone, []

    def plan(self, encoding, budgets_B):
        self.seen.append((encoding.visual_BND[:, 0, 0].clone(), encoding.text_BTD.sum((1, 2)).clone(), encoding.ids))
        full = self.backbone.full(encoding)
        return Masks(encoding.visual_BND[..., 0] > 0, full.heads, full.layers)

    def controller_flops(self, encoding):
        return 0


@pytest.fixture(scope="module")
def scenes():
    return load_queries("scenes:images=12", "test")


@pytest.mark.slow
def test_each_control_hides_what_it_says(tiny, scenes):
    bank = EncodingBank(tiny, scenes)
    planner = Following(tiny)
    records = audit(planner, tiny, bank, scenes, (1.0,))
    names = ["following", "shuffled image", "shuffled question", "constant plan"]
    assert [record["policy"] for record in records] == names
    true, images, questions = (
        {id: (float(image[row]), float(text[row])) for row, id in enumerate(ids)}
        for image, text, ids in (planner.seen[0], *planner.seen[2:4])
    )
    assert all(images[id][0] != true[id][0] and questions[id][0] == true[id][0] for id in true)
    assert all(abs(images[id][1] - true[id][1]) < 1e-4 for id in true)
    assert np.mean([abs(questions[id][1] - true[id][1]) > 1e-4 for id in true]) > 0.5
    spent = {record["policy"]: record["llm_flops_ratio"] for record in records}
    assert spent["constant plan"] <= spent["following"] < 1


def test_swaps_keep_every_image_and_question_and_their_lengths(tiny, scenes):
    images, questions = swapped(scenes, tiny, 0)
    everyone = list(range(len(scenes)))
    assert sorted(questions.questions) == everyone
    assert len({images.image_key(number) for number in everyone}) == len(scenes.by_image())
    for number in everyone:
        assert images.image_key(number) != scenes.image_key(number) == questions.image_key(number)
        own, other = (len(tiny.prompt_ids(source.text(number)[1])[1]) for source in (scenes, questions))
        assert own == other


def test_relevance_is_found_where_it_is_and_is_chance_where_it_is_not(tiny, scenes):
    """Null: keeping the first eight tokens, whatever matters."""
    bank = EncodingBank(tiny, scenes)
    everything = relevance_table(Looking(tiny, scenes), tiny, bank, scenes, 0.5)
    assert everything[1][0] == "all" and everything[1][1] == everything[1][3] == "100.0"
    assert len(everything) == 2 + len(set(scenes.kinds))
    blind = relevance_table(Looking(tiny, scenes, look=False), tiny, bank, scenes, 0.5)
    assert float(blind[1][3]) < 50 and float(blind[1][4]) == pytest.approx(100 * 8 / SIDE**2, abs=0.1)


@pytest.mark.slow
def test_the_command_prints_and_writes(monkeypatch, tmp_path, capsys):
    options = ["--data", "scenes:images=4", "--budgets", "0.5", "--plans", "2"]
    command(monkeypatch, eval_main.main, "audit", "random", *options, "--json", tmp_path / "audit.json")
    printed = capsys.readouterr().out
    assert "constant plan" in printed and "of 2 random plans at 0.5" in printed and "precision %" in printed
    assert len(json.loads((tmp_path / "audit.json").read_text())) == 4


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["full"], "policy 'full' does not follow budgets"),
        (["random", "--plans", "-1"], "--plans is -1"),
        (["random", "--budgets", "2"], "budget 2 is outside (0, 1]"),
    ],
)
def test_bad_options_are_named(monkeypatch, capsys, arguments, words):
    with pytest.raises(SystemExit):
        command(monkeypatch, eval_main.main, "audit", *arguments, "--data", "scenes:images=2")
    assert words in capsys.readouterr().err
