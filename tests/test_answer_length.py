"""Answers of several tokens: where they are cut, and what can then be right. Those of one token are as before."""

import json
from types import SimpleNamespace

import gymnasium
import numpy as np
import pyarrow as pa
import pytest

import maskgym  # noqa: F401  registers the environment
import maskgym.eval.__main__ as eval_main
import maskgym.training.backbone as train_backbone
import maskgym.training.gumbel as train_gumbel
import maskgym.training.rl as train_rl
from maskgym.backbones import Backbone, EncodingBank
from maskgym.envs import MaskingCore
from maskgym.envs.data.answer_length import MOST, AcceptedLengths, answer_cut, cut_of
from maskgym.envs.data.queries import DatasetQueries, load_queries
from maskgym.eval.experiment.cells import Cell, measure
from maskgym.eval.experiment.command import Experiment
from maskgym.eval.measure.evaluate import evaluate
from maskgym.policies.baselines import FullPlanner
from tests.conftest import build, command, make_dataset

BUDGET = "--budgets 0.7"


def queries(answers, rules=None, name="made"):
    rows = make_dataset(len(answers)).remove_columns("answers").add_column("answers", answers)
    return DatasetQueries(rows if rules is None else rows.add_column("scoring", rules), name, "test")


LONG = " ".join(["red"] * (MOST + 8))


@pytest.mark.parametrize(
    ("answers", "given", "tokens", "out_of_reach"),
    [
        ([["red"], ["blue"]], None, 1, 0),
        ([["red"], ["red circle"]], None, 3, 0),
        ([["red"], ["red circle"]], 1, 1, 1),
        ([["red"], ["red circle"]], 2, 2, 0),
        ([["red circle", "yes"], ["no", "a red circle"]], 1, 1, 0),
        ([["red circle", "a red circle"]] * 3, 2, 2, 0),
        ([["red circle", "a red circle"]] * 3, 1, 1, 3),
        ([[""], ["red"]], None, 1, 0),
        ([["red"], [" ".join(["red"] * (MOST - 1))]], None, MOST, 0),
        ([["red"], [" ".join(["red"] * MOST)]], None, MOST, 0),
        ([["red"], [LONG]], None, MOST, 1),
        ([["red"], [LONG]], MOST + 8, MOST + 8, 0),
    ],
)
def test_answers_are_cut_one_token_behind_the_longest(small, answers, given, tokens, out_of_reach):
    cut = cut_of(small, queries(answers), given)
    assert (cut.tokens, cut.out_of_reach, cut.queries) == (tokens, out_of_reach, len(answers))
    assert answer_cut(small, queries(answers), given) == tokens


@pytest.mark.parametrize(
    ("answers", "given", "said"),
    [
        ([["red"]], None, "answers are cut at 1 token (the longest accepted answer of made test)"),
        (
            [["red circle"]],
            None,
            "answers are cut at 3 tokens (the longest accepted answer of made test has 2, and one more shows whether "
            "it ends there)",
        ),
        (
            [["red"], ["red circle"]],
            1,
            "answers are cut at 1 token (as asked for); 1 of 2 queries has no accepted answer of at most 1 token, so "
            "it counts as wrong",
        ),
        (
            [[LONG]] * 1200,
            None,
            "answers are cut at 32 tokens (the longest accepted answer of made test has 40); 1,200 of 1,200 queries "
            "have no accepted answer of at most 32 tokens, so they count as wrong",
        ),
    ],
)
def test_where_is_said_in_a_sentence(small, answers, given, said):
    assert str(cut_of(small, queries(answers), given)) == said


def test_rules_have_their_own_cut_and_know_what_is_right(small):
    rules = ["gqa", None, "gqa"]
    assert cut_of(small, queries([["red"], ["red circle"], [LONG]], rules)).tokens == 16
    mixed = cut_of(small, queries([["red"], [" ".join(["red"] * 20)], [LONG]], rules))
    assert (mixed.tokens, mixed.out_of_reach) == (21, 0)
    assert "as the scoring of made test has it" in str(cut_of(small, queries([["red"]], ["mme"])))


def test_a_part_is_cut_where_its_split_is_and_counts_its_own(small):
    whole = queries([["red"]] * 3 + [["red circle"]])
    assert answer_cut(small, whole.head(2)) == answer_cut(small, whole) == 3
    assert [cut_of(small, part, 1).out_of_reach for part in (whole.head(3), whole, whole.head(4).head(2))] == [0, 1, 0]


def test_any_source_of_texts_will_do(small):
    texts = [("a", "?", ("red",)), ("b", "?", ("red circle", "yes")), ("c", "?", ("a red circle",)), ("d", "?", ())]
    source = type("Texts", (), {"__len__": lambda self: 4, "text": lambda self, number: texts[number]})()
    assert (answer_cut(small, source), cut_of(small, source, 2).out_of_reach) == (4, 1)


def test_answers_that_repeat_are_tokenized_once_for_each_backbone(small):
    """Null: a second backbone is asked anew."""
    asked = []

    class Asked:
        def answer_lengths(self, answers):
            asked.append(sorted(answers))
            return small.answer_lengths(answers)

    rows = pa.chunked_array([pa.array([["red"], ["red circle", "yes"]] * 50_000), pa.array([["yes"]])])
    lengths, backbone = AcceptedLengths(rows), Asked()
    for _ in range(3):
        assert lengths.longest(backbone) == 2 and lengths.shortest(backbone).sum() == 100_001
    assert asked == [["red", "red circle", "yes"]]
    lengths.longest(Asked())
    assert len(asked) == 2


def test_lengths_are_those_of_references(backbone):
    texts = ["red", "a red circle", "", "Yes.", "12:30", "rouge  et bleu"]
    assert backbone.answer_lengths(texts) == [len(backbone.answer_ids(text)) for text in texts]


@pytest.fixture(scope="module")
def talker():
    """A VLM that says more than two tokens, whatever it is asked, and its first two tokens as the accepted answers."""
    backbone = build(seed=199)  # one of few that says words and nothing else
    rows = make_dataset()
    made = DatasetQueries(rows, "made", "test")
    encoding = backbone.encode([made[number] for number in range(len(made))])
    spoken = backbone.answer(encoding, backbone.full(encoding), 3).tokens
    assert all(len(ids) == 3 for ids in spoken)
    texts = [backbone.answer_text(ids[:2]) for ids in spoken]
    assert [backbone.answer_ids(text) for text in texts] == [ids[:2] for ids in spoken], "no words of the vocabulary"
    return backbone, rows.remove_columns("answers").add_column("answers", [[text] for text in texts]), spoken


@pytest.fixture
def ending(talker, monkeypatch):
    """The same VLM, to which some of its third tokens mean the end; and which queries it then ends."""
    backbone, _, spoken = talker
    ends = {ids[2] for ids in spoken} - {token for ids in spoken for token in ids[:2]}
    monkeypatch.setattr(backbone.model.generation_config, "eos_token_id", sorted(ends))
    return [ids[2] in ends for ids in spoken]


def accuracy(backbone, source, **options):
    (record,) = evaluate(
        FullPlanner(backbone), backbone, EncodingBank(backbone, source), (1.0,), progress=False, **options
    )
    return record


def test_a_longer_answer_can_be_right_and_is_where_the_vlm_ends_it(talker, ending):
    """Null: cut at one token, as it was, none is right; without looking for the end all are."""
    backbone, rows, _ = talker
    source = DatasetQueries(rows, "made", "test")
    assert np.mean(ending) > 0, "nothing ends: the comparison shows nothing"
    first, both = (accuracy(backbone, source, max_new_tokens=cut) for cut in (1, 2))
    assert first["accuracy"] == 0 and both["accuracy"] == both["f1"] == 1
    record = accuracy(backbone, source)
    assert record["accuracy"] == np.mean(ending)
    assert record["max_new_tokens"] == 3
    assert record["answer_tokens"] == pytest.approx(3 - np.mean(ending))
    assert record["llm_flops_ratio"] == 1 < record["spent_llm_flops_ratio"]


def test_an_answer_with_a_word_too_few_is_wrong_and_has_its_f1(talker):
    """A rule that scores queries leaves no room for it."""
    backbone, rows, _ = talker
    longer = rows.map(lambda row: {"answers": [f"{row['answers'][0]} circle"]})
    record = accuracy(backbone, DatasetQueries(longer, "made", "test"), max_new_tokens=2)
    assert record["accuracy"] == 0 and 0.5 < record["f1"] < 1
    ruled = DatasetQueries(longer.add_column("scoring", ["gqa"] * 12), "made", "test")
    assert "f1" not in accuracy(backbone, ruled, max_new_tokens=2)


def test_an_answer_that_goes_on_is_another(talker):
    """Unless what comes is no text."""
    backbone, rows, spoken = talker
    ends_all_the_same = [backbone.answer_text(ids) == backbone.answer_text(ids[:2]) for ids in spoken]
    assert np.mean(ends_all_the_same) < 0.5
    assert accuracy(backbone, DatasetQueries(rows, "made", "test"))["accuracy"] == np.mean(ends_all_the_same)


def test_environments_answer_like_evaluations(talker, ending):
    backbone, rows, _ = talker
    source = DatasetQueries(rows, "made", "train")
    for more, expected in (({}, ending), ({"max_new_tokens": 2}, [True] * 12), ({"max_new_tokens": 1}, [False] * 12)):
        core = MaskingCore(backbone, source, **more)
        plans = np.ones((12, core.layout.size), np.int8)
        assert core.step(np.arange(12), np.ones(12), plans).info["accuracy"].tolist() == expected
        env = gymnasium.make("maskgym/Masking-v0", backbone=backbone, data=source, **more)
        env.reset(seed=0, options={"query": 3})
        assert env.step(plans[0])[4]["accuracy"] == expected[3]
        assert env.unwrapped.core.max_new_tokens == core.max_new_tokens == more.get("max_new_tokens", 3)


@pytest.mark.parametrize("data", ["easy-vqa", "scenes:size=32,images=2"])
def test_one_token_answers_are_answered_as_ever(tiny, data, monkeypatch):
    """One token is generated, nothing is cached for more, and records have no further fields."""
    built, prefill = [], type(tiny)._prefill

    def spy(self, encoding, masks, cache):
        built.append(cache)
        return prefill(self, encoding, masks, cache)

    monkeypatch.setattr(type(tiny), "_prefill", spy)
    source = load_queries(data, "test", 4)
    record = accuracy(tiny, source)
    assert not {"max_new_tokens", "answer_tokens", "spent_llm_flops_ratio", "f1"} & record.keys()
    core = MaskingCore(tiny, source)
    core.step(np.arange(4), np.ones(4), np.ones((4, core.layout.size), np.int8))
    assert built == [False, False] and core.max_new_tokens == 1
    for split in ("train", "validation"):
        assert answer_cut(tiny, load_queries(data, split)) == 1


@pytest.fixture(scope="module")
def spoken_data(talker, tmp_path_factory):
    folder = tmp_path_factory.mktemp("talker")
    backbone, rows, _ = talker
    backbone.model.save_pretrained(folder / "vlm")
    backbone.processor.save_pretrained(folder / "vlm")
    rows.save_to_disk(folder / "data")
    return ["--backbone", folder / "vlm", "--data", folder / "data"]


TRAINING = "--total-queries 8 --test-budgets 0.7 --budgets 0.6 1 --batch-size 8 --test-queries 4 --validate-queries 4"
COMMANDS = {
    "run": (eval_main.main, f"run full {BUDGET}"),
    "tune": (eval_main.main, f"tune even {BUDGET}"),
    "audit": (eval_main.main, f"audit even {BUDGET} --plans 2"),
    "elasticity": (eval_main.main, "elasticity --plans 2 --oracle-queries 2 --limit 4"),
    "scale-out": (eval_main.main, "scale-out --rows 2 --repeats 1 --steps 2 --workers 1"),
    "rl": (train_rl.main, f"{TRAINING} --envs 8 --rollout-steps 1"),
    "gumbel": (train_gumbel.main, TRAINING),
    "backbone": (train_backbone.main, "--steps 1 --images 2 --questions 1 --warmup 0 --vision-steps 0"),
}


@pytest.fixture
def cuts(monkeypatch):
    """Where answers were cut."""
    found, answer = [], Backbone.answer

    def spy(self, encoding, masks, max_new_tokens=1, references=None, limit=None):
        found.append(max_new_tokens)
        return answer(self, encoding, masks, max_new_tokens, references, limit)

    monkeypatch.setattr(Backbone, "answer", spy)
    return found


@pytest.mark.parametrize("name", COMMANDS)
@pytest.mark.slow
def test_commands_take_a_cut_and_say_it_once(monkeypatch, spoken_data, tmp_path, capsys, cuts, name):
    main, options = COMMANDS[name]
    # what the question alone says takes long, and answers nothing
    monkeypatch.setattr(eval_main, "question_only_accuracy", lambda *_, **__: np.zeros(1))
    where = ["--out", tmp_path / "run"] if main is not eval_main.main else []
    command(monkeypatch, main, *options.split(), *spoken_data, *where)
    error = capsys.readouterr().err
    assert set(cuts) == {3}
    if name != "scale-out":  # which is about times
        assert error.count("answers are cut at 3 tokens (the longest accepted answer of ") == 1
    if where:
        where = ["--out", tmp_path / "cut"]
    cuts.clear()
    command(monkeypatch, main, *options.split(), *spoken_data, *where, "--max-new-tokens", 1)
    error = capsys.readouterr().err
    assert set(cuts) == {1}
    if name != "scale-out":
        assert "queries have no accepted answer of at most 1 token, so they count as wrong" in error
    with pytest.raises(SystemExit):
        command(monkeypatch, main, *options.split(), *spoken_data, *where, "--max-new-tokens", 0)
    assert "--max-new-tokens is 0; it must be at least 1" in capsys.readouterr().err


def test_an_experiment_hands_its_cut_on(talker, tmp_path, cuts):
    backbone, rows, _ = talker
    experiment = Experiment("training", out=tmp_path, max_new_tokens=2)
    options = experiment._training_options()
    assert options[options.index("--max-new-tokens") + 1] == "2"
    assert "--max-new-tokens" not in Experiment("training", out=tmp_path)._training_options()
    cell = Cell(SimpleNamespace(name="full", policy="full"), 0, tmp_path / "cell")
    bank = EncodingBank(backbone, DatasetQueries(rows, "made", "test"))
    measure(cell, [cell], backbone, bank, (0.7, 1.0), 2)
    assert set(cuts) == {2} and [record["accuracy"] for record in cell.records()] == [1]


@pytest.mark.slow
def test_a_run_that_was_begun_before_goes_on(monkeypatch, spoken_data, tmp_path):
    """Configs and heads of older versions name no cut and no share that may fail."""
    main, options = COMMANDS["rl"]
    command(monkeypatch, main, *options.split(), *spoken_data, "--out", tmp_path / "run")
    config = tmp_path / "run" / "config.yaml"
    kept = [line for line in config.read_text().splitlines() if not line.startswith(("max_new_tokens", "max_failed"))]
    assert len(kept) + 2 == len(config.read_text().splitlines())
    config.write_text("\n".join(kept) + "\n")
    command(monkeypatch, main, "--out", tmp_path / "run", "--resume", "--max-failed", 0.2)
    assert json.loads((tmp_path / "run" / "result.json").read_text())[0]["max_new_tokens"] == 3


@pytest.mark.parametrize("text", [pa.string(), pa.large_string(), pa.string_view()], ids=str)
@pytest.mark.parametrize("several", [pa.list_, pa.large_list, pa.list_view], ids=lambda kind: kind.__name__)
def test_lengths_of_every_kind_of_list(small, text, several):
    lengths = AcceptedLengths(pa.chunked_array([pa.array([["red circle", "red"], ["yes"]], several(text))]))
    assert (lengths.longest(small), lengths.shortest(small).tolist()) == (2, [1, 1])
