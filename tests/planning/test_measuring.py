from __future__ import annotations

from dataclasses import replace

import pytest
from real_models import budgets_of

from tworeel.planning.measuring import BACKWARD, FORWARD, Sizes, measured

SMALL = Sizes(matrix=128, tokens=64, heads=2, head_dim=32, numbers=2**16, seconds=0.01)


def test_a_card_that_is_slower_than_its_figures_is_slowed() -> None:
    """A CPU stands for the card: it is far below an RTX 4090's figures."""
    (budget,) = budgets_of("RTX 4090")
    found = measured(replace(budget, device="cpu"), SMALL)
    assert found.measured and found.slowdown > 10
    assert found.rates.forward(FORWARD) == pytest.approx(found.slowdown * budget.rates.forward(FORWARD))
    assert found.rates.backward(BACKWARD) == pytest.approx(found.slowdown * budget.rates.backward(BACKWARD))


def test_what_was_slowed_already_is_slowed_from_there() -> None:
    (budget,) = budgets_of("RTX 4090")
    slowed = replace(budget, device="cpu", rates=budget.rates.slowed(4.0), slowdown=4.0)
    found = measured(slowed, SMALL)
    assert found.slowdown > 10
    assert found.rates.forward(FORWARD) == pytest.approx(found.slowdown * budget.rates.forward(FORWARD))
