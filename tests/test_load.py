"""Small forms of ``python -m tests.load``, which has the full ones."""

import pytest

from tests import load
from tests.conftest import KINDS

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("kind", KINDS)
def test_a_thousand_plans_of_each_kind_are_within_their_budgets(kind):
    """More than 10,000 in all; at least a third of them differ from all others."""
    made, above, different = load.plan(kind, 1000, batch=350)
    assert made >= 1000 and above == 0 and different > made / 3


def test_a_training_takes_no_more_memory_for_more_queries(capsys):
    """6,000 further queries may take 20 MB; were the features of each of them held (16 visual and up to 64 text tokens
    of width 32 in float32), they would take 60 MB."""
    own, bank = load.train(8_000, marks=(2_000, 8_000), bank_bytes=100_000)
    assert own[8_000] - own[2_000] < 20
    kept = [image.nbytes for image in bank._kept.values()]
    assert 90_000 < sum(kept) <= 100_000 and sum(kept) < len(bank) * kept[0] / 100
    assert "8,000 queries, peak" in capsys.readouterr().out


def test_eight_clients_with_mixed_budgets_are_told_what_they_would_be_told_alone():
    """Batches of one to three questions; trained controllers are in ``tests/test_adaptive.py``."""
    vlm = load.untrained()
    assert load.serve(vlm, clients=8, count=12)[0] == 0
    asked = [ask for request in load.requests(12) for ask in request[2]]
    assert len(set(asked)) > 5
