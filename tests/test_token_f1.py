"""F1 of an answer's words: worked out by hand."""

import pytest

from maskgym.envs.data.scoring import exact_match, token_f1

TABLE = [
    ("red, blue, blue", ("red, blue, blue",), 1),
    ("Red blue  blue.", ("red, blue, blue",), 1),
    ("blue, red, blue", ("red, blue, blue",), 1),
    ("red, blue", ("red, blue, blue",), 2 * (2 / 2) * (2 / 3) / (2 / 2 + 2 / 3)),
    ("red, red, red", ("red, blue, blue",), 1 / 3),
    ("a small red circle", ("a large red circle",), 3 / 4),
    ("3 circles and 1 square", ("2 circles and 1 square",), 4 / 5),
    ("green", ("red, blue, blue",), 0),
    ("", ("red",), 0),
    ("", ("",), 1),
    ("?", ("?",), 1),
    ("!", ("?",), 0),
    ("dark red", ("light blue", "red", "dark"), 2 / 3),
    ("red", (), 0),
]


@pytest.mark.parametrize(("answer", "accepted", "expected"), TABLE)
def test_f1(answer, accepted, expected):
    assert token_f1(answer, accepted) == pytest.approx(expected)
    assert exact_match(answer, accepted) <= token_f1(answer, accepted)
