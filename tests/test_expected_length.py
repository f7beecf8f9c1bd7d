"""Plans are priced at the length that is expected of a question's answer; hard budgets hold for longer ones, too."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from maskgym.backbones import EncodingBank
from maskgym.backbones.answers import Limit
from maskgym.backbones.expected_length import check_expected, expected_tokens, numbers_of
from maskgym.envs.data.expected_length import FEWEST, mean_length, predicted_length
from maskgym.envs.data.queries import DatasetQueries, load_queries
from maskgym.eval.measure.evaluate import evaluate, outcomes
from maskgym.policies.baselines import FullPlanner, RandomPlanner
from maskgym.policies.controller.learned import ControllerPlanner
from maskgym.policies.controller.network import ControllerConfig, TwoLevelController
from maskgym.policies.planning.even import EvenPlanner
from maskgym.policies.planning.projection import budget_flops, least_share, project
from maskgym.policies.static.search import SearchSettings, StaticSearch
from tests.conftest import build, make_dataset, random_masks
from tests.test_cost import counted

TREE = {"word": "color", "with": 3, "without": {"word": "circle", "with": 5, "without": 2}}
NUMBERS = list(range(12))
MOST = 8


@pytest.fixture(scope="module")
def told():
    """A VLM that expects three tokens where a color is asked for, five where it is about a circle."""
    return build(seed=199, expected_answer_tokens=TREE)


@pytest.fixture
def encoding(told, source):
    return EncodingBank(told, source).gather(NUMBERS)


# What is expected


@pytest.mark.parametrize(
    ("question", "tokens"), [("What COLOR is the circle?", 3), ("a circle, or not", 5), ("colors", 2), ("", 2)]
)
def test_a_tree_goes_by_whole_words(question, tokens):
    assert expected_tokens(TREE, [question], torch.device("cpu")).tolist() == [tokens]


@pytest.mark.parametrize("expected", [True, 4, np.int64(4), TREE])
def test_what_is_expected_comes_as_plain_python(expected):
    assert check_expected(expected) == expected and expected_tokens(4, ["a"], torch.device("cpu")) == 4
    assert all(type(number) is int for number in numbers_of(check_expected(expected)))


def test_an_encoding_expects_by_its_question_and_its_rows_do(told, source, encoding):
    """Neither other queries beside it nor its own answers have a part in it."""
    assert encoding.expected_tokens.tolist() == [3, 5] * 6
    assert encoding.rows(torch.tensor([3, 0, 3])).expected_tokens.tolist() == [5, 3, 5]
    (query,) = [source[1]]
    for answers in ((), ("red",), ("red blue green " * 9,)):
        assert told.encode([replace(query, answers=answers)]).expected_tokens.tolist() == [5]
    plain = build(seed=199)
    assert EncodingBank(plain, source).gather(NUMBERS).rows(torch.tensor([1, 2])).expected_tokens == 1


# What it costs


@pytest.mark.parametrize("row", [0, 1])
def test_the_priced_cost_is_what_so_many_steps_take(told, encoding, row):
    one = encoding.rows(torch.tensor([row]))
    masks = random_masks(told, 1, seed=row)
    counted_flops = counted(lambda: told.answer(one, masks, int(one.expected_tokens)))
    assert told.answer(one, masks, int(one.expected_tokens)).spent_tokens.tolist() == one.expected_tokens.tolist()
    cost = told.cost(one, masks)
    assert counted_flops == int(cost.prefill + cost.decode)
    assert int(cost.decode) > 0


def test_rows_are_priced_as_alone_at_their_numbers(told, encoding):
    masks = random_masks(told, len(NUMBERS))
    each = [3, 5] * 6
    assert torch.equal(told.cost(encoding, masks).llm, told.cost(encoding, masks, new_tokens=torch.tensor(each)).llm)
    for row, number in enumerate(each):
        alone = replace(encoding.rows(torch.tensor([row])), expected_tokens=number)
        assert told.full_llm_flops(encoding)[row] == told.full_llm_flops(alone)
        assert least_share(told, encoding)[row] == least_share(told, alone)


def test_one_token_for_all_is_the_same_as_ever(source):
    plain, same = build(seed=199), build(seed=199, expected_answer_tokens=1)
    one, ones = (EncodingBank(backbone, source).gather(NUMBERS) for backbone in (plain, same))
    ones = replace(ones, expected_tokens=torch.ones(12, dtype=torch.long))
    masks = random_masks(plain, 12)
    for part in ("prefill", "decode", "llm"):
        assert torch.equal(getattr(plain.cost(one, masks), part), getattr(same.cost(ones, masks), part))


@pytest.mark.parametrize("budget", [0.6, 0.8])
def test_plans_fit_at_the_expected_length(told, encoding, budget):
    """Null: fitted at one token, some do not."""
    budgets = torch.full((12,), budget, dtype=torch.float64)
    confidence = torch.rand(12, told.layout.size, generator=torch.Generator().manual_seed(1))
    config = ControllerConfig.for_layout(told.layout, told.hidden)
    learned = ControllerPlanner(TwoLevelController(config), told, "rl")
    limits = budget_flops(budgets, told.full_llm_flops(encoding))

    def fits(masks, charge=0):
        return told.cost(encoding, masks, charge).llm <= limits

    full = told.full(encoding)
    assert fits(project(told, full, confidence, budgets, encoding)).all()
    for planner in (learned, EvenPlanner(told), RandomPlanner(told, 0)):
        assert fits(planner.plan(encoding, budgets), planner.controller_flops(encoding)).all()
    at_one = project(told, full, confidence, budgets, replace(encoding, expected_tokens=1))
    assert not fits(at_one).all()


def test_the_static_search_prices_alike(told, encoding):
    search = StaticSearch(told, [encoding.rows(torch.tensor([1, 0]))], SearchSettings(4, 2))
    bits = told.layout.flatten(random_masks(told, 6, keep=0.8))
    bits[:, told.layout.tokens :] |= told.layout.protected()[told.layout.tokens :]
    first = encoding.rows(torch.tensor([1] * 6))
    assert torch.equal(search.flops(bits), told.cost(first, told.layout.unflatten(bits)).llm)
    assert search.full_flops == float(told.full_llm_flops(first)[0])


# From which it is expected


def queries(asked, name="made", split="train"):
    rows = make_dataset(len(asked)).remove_columns(["question", "answers"])
    rows = rows.add_column("question", [question for question, _ in asked])
    return DatasetQueries(rows.add_column("answers", [[answer] for _, answer in asked]), name, split)


@pytest.fixture(scope="module")
def asked():
    """Enough of three kinds of questions: a word apart, and noise that says nothing."""
    kinds = [("what color is it {}", "red"), ("is there a circle {}", "yes red blue"), ("what shape {}", "red circle")]
    return [(kinds[n % 3][0].format(f"n{n % 7}"), kinds[n % 3][1]) for n in range(4 * FEWEST)]


def test_the_tree_finds_the_words_that_lengths_go_by(small, asked):
    expected = predicted_length(small, queries(asked))
    found = expected_tokens(expected, [question for question, _ in asked[:3]], torch.device("cpu"))
    assert found.tolist() == [2, 4, 3] and sorted(numbers_of(expected)) == [2, 3, 4]
    assert mean_length(small, queries(asked)) == 3
    assert predicted_length(small, queries(asked)) == expected == check_expected(expected)
    assert predicted_length(small, queries(asked), 1) == mean_length(small, queries(asked), 1) == 1


def test_a_word_of_few_questions_and_lengths_without_words_divide_nothing(small, asked):
    rare = [("what", "red")] * (4 * FEWEST) + [("why", "yes red blue")] * (FEWEST - 1)
    assert predicted_length(small, queries(rare)) == 3
    at_random = np.random.default_rng(0).permutation([answer for _, answer in asked])
    noise = predicted_length(small, queries([("what", str(answer)) for answer in at_random]))
    assert noise == 3


def test_one_token_is_expected_where_all_answers_are_one(tiny):
    for data in ("easy-vqa", "scenes:size=32,images=8"):
        train = load_queries(data, "train", None)
        assert predicted_length(tiny, train) == mean_length(tiny, train) == 1


# What is spent, and the rule for hard budgets


def planned(backbone, source, budget):
    encoding = EncodingBank(backbone, source).gather(NUMBERS)
    budgets = torch.full((12,), budget, dtype=torch.float64)
    planner = EvenPlanner(backbone)
    charge = planner.controller_flops(encoding)
    limits = budget_flops(budgets, backbone.full_llm_flops(encoding))
    return encoding, planner.plan(encoding, budgets), Limit(limits, charge)


@pytest.mark.parametrize("budget", [0.5, 0.7, 0.9, 1.0])
@pytest.mark.parametrize("expected", [1, 3, TREE], ids=str)
def test_hard_budgets_hold_to_the_flop_and_soft_ones_do_not(source, expected, budget):
    backbone = build(seed=199, expected_answer_tokens=expected)
    encoding, masks, limit = planned(backbone, source, budget)

    def spent(answers, more=0):
        tokens = answers.spent_tokens + more
        return backbone.cost(encoding, answers.masks, limit.controller, tokens).llm

    soft = backbone.answer(encoding, masks, 2 * MOST)
    hard = backbone.answer(encoding, masks, 2 * MOST, limit=limit)
    assert (spent(soft) > limit.flops_B).any(), "all answers are short: the comparison shows nothing"
    assert (spent(hard) <= limit.flops_B).all()
    cut = torch.tensor(hard.cut)
    assert (hard.spent_tokens >= torch.as_tensor(encoding.expected_tokens).minimum(soft.spent_tokens)).all()
    assert cut.any() and not any(soft.cut)
    assert (spent(hard, 1) > limit.flops_B)[cut].all(), "cut though there was room for another token"
    for long, short, was_cut in zip(soft.tokens, hard.tokens, hard.cut, strict=True):
        assert long[: len(short)] == short and (was_cut or long == short)


def test_slack_lets_an_answer_go_on(told, encoding):
    """A plan below its budget has room for as many tokens as the rest pays for, and each row has its own."""
    masks = random_masks(told, 12, keep=0.5)
    limit = Limit(told.full_llm_flops(encoding), 1000)
    room = told.affordable_tokens(encoding, masks, limit, 100)
    assert (room > encoding.expected_tokens).all() and len(set(room.tolist())) > 3
    assert (told.cost(encoding, masks, 1000, room).llm <= limit.flops_B).all()
    below = room < 100
    assert (told.cost(encoding, masks, 1000, room + 1).llm > limit.flops_B)[below].all() and below.any()
    for row in range(0, 12, 4):
        one = encoding.rows(torch.tensor([row]))
        alone = Limit(limit.flops_B[row : row + 1], 1000)
        assert told.affordable_tokens(one, masks[row : row + 1], alone, 100) == room[row]


def test_the_first_token_is_said_whatever_it_costs(told, encoding):
    nothing = Limit(torch.zeros(12, dtype=torch.long))
    answers = told.answer(encoding, told.full(encoding), MOST, limit=nothing)
    assert answers.spent_tokens.tolist() == [1] * 12 and all(answers.cut)
    assert answers.tokens == told.answer(encoding, told.full(encoding), 1).tokens


def test_an_answer_that_ends_where_its_room_does_is_not_cut(told, encoding, monkeypatch):
    one = encoding.rows(torch.tensor([0]))
    full = told.full(one)
    (said,) = told.answer(one, full, 3).tokens
    limit = Limit(told.full_llm_flops(one))
    assert told.answer(one, full, MOST, limit=limit).cut == [True]
    assert told.answer(one, full, 3, limit=limit).cut == [False], "it was cut where all are"
    monkeypatch.setattr(told.model.generation_config, "eos_token_id", said[2])
    ended = told.answer(one, full, MOST, limit=limit)
    assert (ended.cut, ended.tokens, ended.generated) == ([False], [said[:2]], [3])
    *_, last = told.stream(one, full, MOST, limit)
    assert (last.tokens, last.generated, last.cut) == (ended.tokens, ended.generated, ended.cut)


def test_records_say_what_was_spent_and_what_was_cut(told, source):
    bank = EncodingBank(told, source)
    how = {"max_new_tokens": MOST, "progress": False}
    (soft,), (hard,) = (outcomes(EvenPlanner(told), told, bank, (0.7,), hard=rule, **how) for rule in (False, True))
    encoding, masks, limit = planned(told, source, 0.7)
    full = told.full_llm_flops(encoding)
    for outcome, answers in (
        (soft, told.answer(encoding, masks, MOST)),
        (hard, told.answer(encoding, masks, MOST, limit=limit)),
    ):
        spent = told.cost(encoding, masks, limit.controller, answers.spent_tokens).llm
        assert outcome.columns["spent_llm_flops_ratio"].tolist() == (spent / full).double().tolist()
        assert outcome.record["overspent"] == float((spent > limit.flops_B).double().mean())
        longer = (answers.spent_tokens > encoding.expected_tokens).double().mean()
        assert outcome.record["longer_than_priced"] == float(longer)
        assert outcome.record["expected_tokens"] == 4
        assert outcome.record["budget_violations"] == 0
    assert soft.record["overspent"] > 0 == hard.record["overspent"]
    assert "cut" not in soft.record and hard.record["cut"] > 0
    assert hard.record["spent_llm_flops_ratio"] <= 0.7 < soft.record["spent_llm_flops_ratio"]
    (whole,) = evaluate(FullPlanner(told), told, bank, (1.0,), hard=True, **how)
    assert whole["answer_tokens"] == MOST and not {"cut", "overspent"} & whole.keys()
