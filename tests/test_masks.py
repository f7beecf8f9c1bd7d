import numpy as np
import pytest
import torch

from maskgym.backbones import InputError, MaskLayout

LAYOUT = MaskLayout(tokens=3, layers=2, heads=2)


def test_flat_action_order_is_tokens_heads_by_layer_layers():
    action = np.array([1, 0, 1, 1, 0, 0, 1, 1, 0], np.int8)
    masks = LAYOUT.parse(action)
    assert masks.tokens.tolist() == [[True, False, True]]
    assert masks.heads.tolist() == [[[True, False], [False, True]]]
    assert masks.layers.tolist() == [[True, False]]
    assert masks.effective_heads.tolist() == [[[True, False], [False, False]]]


def test_every_action_survives_the_round_trip():
    actions = np.array([[number >> bit & 1 for bit in range(9)] for number in range(512)], np.int8)
    assert LAYOUT.flatten(LAYOUT.parse(actions)).numpy().astype(np.int8).tolist() == actions.tolist()


def test_protected_layers_are_kept_whatever_the_action_says():
    layout = MaskLayout(3, 2, 2, protected_layers=(1,))
    masks = layout.parse(np.zeros(9, np.int8))
    assert masks.layers.tolist() == [[False, True]]
    assert masks.heads.tolist() == [[[False, False], [True, True]]]
    assert layout.protected().tolist() == [False] * 5 + [True, True, False, True]


def test_unflatten_leaves_its_input_alone():
    bits = torch.zeros(1, 9, dtype=torch.bool)
    MaskLayout(3, 2, 2, protected_layers=(0,)).unflatten(bits)
    assert not bits.any()


@pytest.mark.parametrize(
    ("action", "words"),
    [
        (np.ones(8), "takes a flat vector of 9"),
        (np.ones((2, 2, 9)), "takes a flat vector of 9"),
        (np.array([1, 0, 2, 1, 0, 0, 1, 1, 0]), "value 2 at row 0, position 2"),
        (np.array([1, 0, 0.5, 1, 0, 0, 1, 1, 0]), "value 0.5"),
        (np.array([1, 0, np.nan, 1, 0, 0, 1, 1, 0]), "value nan"),
    ],
)
def test_bad_actions_are_named(action, words):
    with pytest.raises(InputError, match=words):
        LAYOUT.parse(action)


def test_impossible_layouts_are_refused():
    with pytest.raises(InputError, match="tokens is 0"):
        MaskLayout(0, 2, 2)
    with pytest.raises(InputError, match=r"\[2\] do not exist"):
        MaskLayout(3, 2, 2, protected_layers=(2,))
