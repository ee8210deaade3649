from __future__ import annotations

from real_models import budgets_of

from tworeel.units import GIB


def test_a_card_has_less_than_its_name_says() -> None:
    (budget,) = budgets_of("RTX 4090")
    assert 22.5 * GIB < budget.free == budget.total < 24 * GIB
    assert budget.context is not None and budget.free + budget.context == 24 * GIB


def test_the_same_card_once_more_is_another_device() -> None:
    (budget,) = budgets_of("RTX 4090")
    other = budget.another(1)
    assert (other.device, other.card, other.free) == ("cuda:1", "RTX 4090", budget.free)
