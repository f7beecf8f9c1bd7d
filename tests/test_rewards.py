import json
from dataclasses import replace

import numpy as np
import pytest

from maskgym.backbones import InputError
from maskgym.envs.data.scoring import exact_match, reference, score, vqa_accuracy
from maskgym.envs.reward_spec import WeightedReward
from maskgym.envs.rewards import RewardTerms

TERMS = RewardTerms(
    accuracy=np.array([1.0, 0.0, 1.0]),
    log_likelihood=np.array([-0.1, -9.0, -0.5]),
    flops=np.array([0.5, 0.75, 0.2]),
    budget=np.array([0.5, 0.5, 0.4]),
    kept_tokens=np.array([8.0, 16.0, 2.0]),
    kept_heads=np.array([4.0, 8.0, 2.0]),
    kept_layers=np.array([2.0, 3.0, 1.0]),
)


@pytest.mark.parametrize(
    ("reward", "expected"),
    [
        ("accuracy", [1, 0, 1]),
        ("accuracy-flops", [0.99, -0.015, 0.996]),
        ("budget-hinge", [1, -1, 1]),
        ("overspend", [0, 0.5, 0]),
        ("log-likelihood", [-0.1, -5, -0.5]),
        ("soft-accuracy", [0.7551155, 0.01098761, 0.5538839]),
        (["accuracy", "-0.2*flops"], [0.9, -0.15, 0.96]),
        (["2*accuracy", "0.5*log-likelihood"], [1.95, -2.5, 1.75]),
        ("tests.test_rewards:tokens_left", [-8, -16, -2]),
        (["accuracy", "0.1*tests.test_rewards:tokens_left"], [0.2, -1.6, 0.8]),
        (lambda terms: terms.kept_layers, [2, 3, 1]),
    ],
)
def test_rewards_against_arithmetic(reward, expected):
    assert WeightedReward(reward)(TERMS).tolist() == pytest.approx(expected)


def test_a_known_latency_is_a_term_and_an_unknown_one_is_named():
    with pytest.raises(InputError, match="reward 'latency' raised ValueError: there is no latency model; calibrate"):
        WeightedReward("latency")(TERMS)
    timed = replace(TERMS, latency=np.array([0.5, 0.8, 0.3]))
    assert WeightedReward(["accuracy", "-2*latency"])(timed).tolist() == pytest.approx([0, -1.6, 0.4])
    assert "latency" in timed.as_dict() and "latency" not in TERMS.as_dict()


def test_prices_rise_where_plans_overspend_and_only_there():
    reward = WeightedReward("lagrangian")
    over = replace(TERMS, flops=np.array([0.6, 0.6, 0.3]), budget=np.array([0.5, 0.5, 0.9]))
    first = reward(over)
    assert first.tolist() == TERMS.accuracy.tolist(), "prices start at nothing"
    for _ in range(9):
        last = reward(over)
    prices = reward.state()[0]["prices"]
    assert prices[4] == pytest.approx(10 * 0.05 * 0.2) and prices[7] == 0
    assert last.tolist() == pytest.approx([1 - 0.09 * 0.2, -0.09 * 0.2, 1])
    again = WeightedReward("lagrangian")
    again.load_state(json.loads(json.dumps(reward.state())))
    assert again(over).tolist() == reward(over).tolist()
    under = replace(TERMS, flops=np.array([0.1, 0.1, 0.1]), budget=np.array([0.5, 0.5, 0.9]))
    for _ in range(9):
        reward(under)
    assert reward.state()[0]["prices"][4] == 0
    assert WeightedReward("lagrangian").state()[0]["prices"][4] == 0, "each use has prices of its own"
    assert WeightedReward(["accuracy", "flops"]).state() == [None, None]


def tokens_left(terms):
    return -terms.kept_tokens


def raising(terms):
    return terms.accuracy / [1, 2]


def scalar(terms):
    return 1.0


def nan(terms):
    return np.where(terms.accuracy > 0, np.nan, 0.0)


NOT_A_FUNCTION = 3


@pytest.mark.parametrize(
    ("reward", "words"),
    [
        ("acuracy", "unknown reward 'acuracy'; use one of accuracy, "),
        ("x*accuracy", "weight 'x' is not a number"),
        ("no.such.module:f", r"cannot be imported \(ModuleNotFoundError"),
        ("tests.test_rewards:no_such", r"cannot be imported \(AttributeError"),
        ("tests.test_rewards:NOT_A_FUNCTION", "is a int; it must be a function"),
        ([], "no reward given"),
    ],
)
def test_bad_rewards_are_refused_when_chosen(reward, words):
    with pytest.raises(InputError, match=words):
        WeightedReward(reward)


@pytest.mark.parametrize(
    ("function", "words"),
    [
        (raising, r"reward 'raising' raised ValueError: .* \(queries a, b, c\)"),
        (scalar, r"returned shape \(\); it must return one number a row, \(3,\)"),
        (nan, r"returned nan in 2 of 3 rows \(queries a, c\)"),
    ],
)
def test_failing_rewards_name_themselves_and_the_queries(function, words):
    with pytest.raises(InputError, match=words):
        WeightedReward(function)(TERMS, ["a", "b", "c"])


def test_exact_match_ignores_case_spaces_and_a_full_stop():
    assert exact_match(" Red. ", ["red"]) == 1
    assert exact_match("red", ["blue", "RED"]) == 1
    assert exact_match("reddish", ["red"]) == 0


def test_vqa_accuracy_by_hand():
    ten = ["cat"] * 2 + ["dog"] * 8
    # "cat": leaving out a cat leaves 1 match (1/3), twice; leaving out a dog leaves 2 (2/3), eight times
    assert vqa_accuracy("cat", ten) == pytest.approx((2 * (1 / 3) + 8 * (2 / 3)) / 10)
    assert vqa_accuracy("dog", ten) == 1
    assert vqa_accuracy("cow", ten) == 0
    assert score("cat", ["cat"]) == 1
    assert score("cat", ten) == vqa_accuracy("cat", ten)


def test_reference_is_the_most_frequent_answer():
    assert reference(["dog", "cat", "cat"]) == "cat"
