"""When a training has settled, and what a table says of how sure it is."""

import pytest
from scipy.stats import binomtest

from maskgym.eval.measure.report import errors, table
from maskgym.training.settling import Settling

BETTER, CHEAPER, SAME = (0.9, 0.5), (0.8, 0.4), (0.8, 0.495)
"""Accuracy and FLOPs of validations after one of 0.8 and 0.5."""


def validation(accuracy, flops):
    """One at two budgets, of these means."""
    return [{"accuracy": accuracy + off, "llm_flops_ratio": flops - off} for off in (-0.05, 0.05)]


def seen(patience, *validations):
    settling = Settling(patience)
    for each in validations:
        settling.see(validation(*each))
    return settling


@pytest.mark.parametrize(
    ("validations", "settled"),
    [
        ([SAME], False),
        ([SAME, SAME], True),
        ([(0.7, 0.5), (0.79, 0.5)], True),  # not what it was before
        ([SAME, BETTER], False),
        ([SAME, CHEAPER, SAME], False),
        ([SAME, BETTER, SAME, SAME], True),
        ([(0.8, 0.495), (0.8, 0.489)], False),  # little by little, from what was best
    ],
)
def test_a_training_settles_when_nothing_is_gained(validations, settled):
    assert seen(2, (0.8, 0.5), *validations).settled is settled


def test_without_patience_or_a_budget_that_is_met_it_never_does():
    assert not seen(0, *[SAME] * 9).settled
    settling = Settling(1)
    for _ in range(9):
        settling.see([])
    assert not settling.settled


@pytest.mark.parametrize("before", [0, 1, 3])
def test_what_was_seen_is_kept_in_checkpoints(before):
    validations = [(0.8, 0.5), SAME, BETTER, SAME, SAME]
    continued = Settling(2)
    continued.load_state(seen(2, *validations[:before]).state())
    for each in validations[before:]:
        continued.see(validation(*each))
    assert continued.settled and continued.state() == seen(2, *validations).state()


@pytest.mark.parametrize(("right", "n"), [(0, 10), (7, 10), (10, 10), (999, 1000)])
def test_intervals_are_wilsons(right, n):
    below, above = errors({"accuracy": right / n, "n": n})
    expected = binomtest(right, n).proportion_ci(method="wilson")
    assert (right / n - below, right / n + above) == pytest.approx((expected.low, expected.high))


def test_a_table_is_not_sure_of_what_few_queries_say():
    """Null: the standard error would be zero."""
    record = {"policy": "full", "budget": 1.0, "accuracy": 1.0, "accuracy_stderr": 0.0, "n": 100}
    head, _, row = (line.split("|") for line in table([record]).splitlines())
    assert dict(zip(map(str.strip, head), map(str.strip, row), strict=True))["± %"] == "3.70"
