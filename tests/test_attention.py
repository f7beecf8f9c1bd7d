"""The attention kernels agree, and packed rows reach FlashAttention as it asks for them."""

import pytest
import torch

from maskgym.backbones import InputError
from maskgym.backbones.engine import attention
from maskgym.backbones.engine.ragged import Ragged
from tests.conftest import build

SCALE = 0.3


def by_the_book(q, k, v, lengths, scale):
    """Row by row, head by head, with an explicit triangle."""
    out, start, repeat = [], 0, q.shape[1] // k.shape[1]
    for length in lengths:
        rows = slice(start, start + length)
        keys, values = (x[rows].repeat_interleave(repeat, dim=1) for x in (k, v))
        logits = torch.einsum("phw,shw->hps", q[rows], keys) * scale
        logits = logits.masked_fill(torch.ones(length, length).triu(1).bool(), -torch.inf)
        out.append(torch.einsum("hps,shw->phw", logits.softmax(-1), values))
        start += length
    return torch.cat(out)


def stand_in(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, softmax_scale=None, causal=False):
    """FlashAttention-2's call, computed by the book: the library itself needs a GPU."""
    assert causal and torch.equal(cu_seqlens_q, cu_seqlens_k) and cu_seqlens_q.dtype == torch.int32
    lengths = cu_seqlens_q.diff().tolist()
    assert max_seqlen_q == max_seqlen_k == max(lengths) and len(q) == sum(lengths)
    return by_the_book(q, k, v, lengths, softmax_scale)


@pytest.mark.parametrize("lengths", [[4], [3, 3, 3], [5, 1, 3]])
@pytest.mark.parametrize("groups", [1, 2, 4])
def test_kernels_agree(monkeypatch, lengths, groups):
    torch.manual_seed(0)
    q, k, v = (torch.randn(sum(lengths), heads, 8) for heads in (4, groups, groups))
    expected = by_the_book(q, k, v, lengths, SCALE)
    ragged = Ragged(torch.tensor(lengths))
    assert torch.allclose(attention.attend_within_rows(q, k, v, ragged, SCALE, "sdpa"), expected, atol=1e-5)
    monkeypatch.setattr(attention, "flash_attn_varlen_func", stand_in)
    assert torch.allclose(attention.attend_within_rows(q, k, v, ragged, SCALE, "flash"), expected, atol=1e-5)


def test_the_whole_model_runs_on_flash(monkeypatch, source):
    monkeypatch.setattr(attention, "flash_attn_varlen_func", stand_in)
    sdpa, flash = (build(heads=8, kv_heads=2, slots=4, attention=kernel) for kernel in ("sdpa", "flash"))
    encoding = sdpa.encode([source[number] for number in range(4)])
    masks = sdpa.layout.full(4)
    masks.tokens[1, 5:] = False
    masks.heads[2, 1, ::2] = False
    masks.layers[3, 2] = False
    answers = [backbone.answer(encoding, masks, 6, ["red"] * 4) for backbone in (sdpa, flash)]
    assert answers[0].tokens == answers[1].tokens
    assert torch.allclose(answers[0].log_likelihood, answers[1].log_likelihood, atol=1e-5)


def test_kernels_that_cannot_run_are_refused(monkeypatch):
    monkeypatch.setattr(attention, "flash_attn_varlen_func", None)
    with pytest.raises(InputError, match="flash-attn is not installed; install it, or use attention='sdpa'"):
        build(attention="flash")
    with pytest.raises(InputError, match="attention is 'eager'; it must be one of 'auto', 'sdpa', 'flash'"):
        build(attention="eager")
