"""Visual tokens that leave together in elastic training."""

import torch

from maskgym.backbones import EncodingBank
from maskgym.policies.baselines import random_waits
from maskgym.training import coherent
from maskgym.training.coherent import reorder_tokens


def waits_of(small, source, rows, monkeypatch=None, kind=None):
    encoding = EncodingBank(small, source).gather([0]).rows(torch.zeros(rows, dtype=torch.long))
    before = random_waits(small, rows, torch.Generator().manual_seed(0))
    if kind is not None:
        monkeypatch.setattr(coherent, "CHANCES", [float(kind == name) for name in coherent.KINDS])
    return encoding, before, reorder_tokens(before, encoding, torch.Generator().manual_seed(1))


def test_only_the_order_of_tokens_changes_and_only_in_some_rows(small, source):
    _, before, after = waits_of(small, source, 400)
    tokens = small.layout.tokens
    assert torch.equal(before[:, tokens:], after[:, tokens:])
    assert torch.equal(before[:, :tokens].sort(1).values, after[:, :tokens].sort(1).values)
    alone = (before == after).all(1).float().mean()
    assert abs(float(alone) - coherent.CHANCES[0]) < 0.08
    assert torch.equal(after, waits_of(small, source, 400)[2])


def test_tokens_that_look_alike_leave_together(small, source, monkeypatch):
    """Ranks of neighbours in content, or on the grid, against ranks drawn alone."""
    side = 4
    differences = {}
    for kind in coherent.KINDS:
        encoding, _, after = waits_of(small, source, 600, monkeypatch, kind)
        ranks = after[:, : side * side].argsort(1).argsort(1).float()
        visual = encoding.visual_BND[0].float()
        nearest = torch.cdist(visual, visual).fill_diagonal_(torch.inf).argmin(1)
        grid = ranks.view(-1, side, side)
        differences[kind] = {
            "content": float((ranks - ranks[:, nearest]).abs().mean()),
            "place": float(grid.diff(dim=2).abs().mean()),
        }
    for kind in ("content", "place"):
        assert differences[kind][kind] < 0.9 * differences["alone"][kind]
