"""Shifts of logits that spend a budget: found, exact, the same alone and in a batch."""

import pytest
import torch

from maskgym.policies.controller.filling import fill

ROWS, UNITS = 64, 94


def weights():
    return torch.rand(UNITS, generator=torch.Generator().manual_seed(1), dtype=torch.float64) * 1e6


def price(gates):
    """Rises with every gate, faster where more are open, as attention does."""
    spent = (gates.double() * weights()).sum(1)
    return spent + spent * spent / 1e7 + 1e5


def drawn(scale, seed=0):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(ROWS, UNITS, generator=generator) * scale
    free = torch.rand(ROWS, UNITS, generator=generator) > 0.1
    share = torch.rand(ROWS, generator=generator, dtype=torch.float64)
    least, most = price((~free).float()), price(torch.ones(ROWS, UNITS))
    return logits, free, least + (0.02 + 0.96 * share) * (most - least)


def spent(logits, free, temperature=1.0):
    return price((logits / temperature).sigmoid().where(free, 1.0))


@pytest.mark.parametrize("temperature", [0.2, 1.0, 4.0])
@pytest.mark.parametrize("scale", [0.0, 0.1, 2.0, 20.0])
def test_what_is_spent_is_the_limit(scale, temperature):
    """Null: without a shift it is not."""
    logits, free, limits = drawn(scale)
    filled = fill(logits, free, price, limits, temperature)
    assert torch.allclose(spent(filled, free, temperature), limits, rtol=1e-5)
    assert ((spent(logits, free, temperature) - limits).abs() / limits).median() > 0.05
    shifts = logits - filled
    assert torch.allclose(shifts, shifts[:, :1].expand_as(shifts), atol=2e-5), "one shift a row"


def test_a_row_does_not_depend_on_the_others():
    logits, free, limits = drawn(3.0)
    together = fill(logits, free, price, limits)
    for row in range(0, ROWS, 7):
        alone = fill(logits[row : row + 1], free[row : row + 1], price, limits[row : row + 1])
        assert torch.equal(alone[0], together[row])


def test_few_prices_are_asked_for():
    """Bisection to the same precision would need 30."""
    asked = []

    def counted(gates):
        asked.append(None)
        return price(gates)

    logits, free, limits = drawn(2.0)
    fill(logits, free, counted, limits)
    assert len(asked) <= 14


def test_limits_out_of_reach_shift_as_far_as_is_sought():
    logits, free, limits = drawn(1.0)
    for limit, way in ((1e12, 1), (1.0, -1)):
        leaf = logits.clone().requires_grad_()
        filled = fill(leaf, free, price, torch.full_like(limits, limit))
        ends = (filled * way).detach().amin(1)
        assert torch.allclose(ends, torch.full_like(ends, 12.0), atol=1e-5)
        (slopes,) = torch.autograd.grad(filled.sum(), leaf)
        assert torch.equal(slopes, torch.ones_like(slopes)), "nothing moves but the logits themselves"


def test_the_derivative_is_that_of_the_solution():
    logits, free, limits = (part[:1] for part in drawn(1.0))
    logits = logits.double()
    aims = torch.randn(UNITS, generator=torch.Generator().manual_seed(2), dtype=torch.float64)

    def value(at):
        return (fill(at, free, price, limits).sigmoid() * aims).sum()

    leaf = logits.clone().requires_grad_()
    (exact,) = torch.autograd.grad(value(leaf), leaf)
    for unit in (0, 31, 93):
        ends = []
        for step in (-1e-3, 1e-3):
            moved = logits.clone()
            moved[0, unit] += step
            ends.append(float(value(moved)))
        assert float(exact[0, unit]) == pytest.approx((ends[1] - ends[0]) / 2e-3, rel=1e-3, abs=1e-5)
