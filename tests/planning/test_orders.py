from __future__ import annotations

from collections import Counter

import pytest
from real_models import budgets_of, limited

from tworeel.planning.orders import MOST_ORDERS, distinct_orders
from tworeel.units import GIB


def cards(gpus: str) -> list[tuple[str, ...]]:
    return [tuple(budget.card for budget in order) for order in distinct_orders(budgets_of(gpus))]


@pytest.mark.parametrize(
    ("gpus", "count"),
    [
        ("RTX 4090", 1),
        ("2x RTX 4090", 1),
        ("RTX 4090, RTX 3060 12GB", 2),
        ("RTX 3060 12GB, 4x RTX 4090", 5),
        ("2x RTX 4090, 2x RTX 3090, RTX 3060 12GB", 30),
        ("RTX 5090, RTX 4090, RTX 3090, RTX 4080, RTX 3060 12GB", 120),
    ],
)
def test_each_order_that_makes_a_difference_is_there_once(gpus: str, count: int) -> None:
    found = cards(gpus)
    assert len(found) == len(set(found)) == count
    assert len({tuple(sorted(order)) for order in found}) == 1


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("RTX 3060 12GB, 4x RTX 4090", "4x RTX 4090, RTX 3060 12GB"),
        ("2x RTX 4090, 3x RTX 3090, 2x RTX 4080", "RTX 4080, 3x RTX 3090, RTX 4080, 2x RTX 4090"),
    ],
)
def test_orders_do_not_depend_on_how_the_cards_are_named(one: str, other: str) -> None:
    assert cards(one) == cards(other)


def test_of_many_unlike_cards_those_near_to_what_is_sorted_by_memory_are_there() -> None:
    gpus = "RTX 5090, RTX 4090, RTX 3090, RTX 4080, RTX 4070, RTX 3060 12GB, RTX 4060 Ti 16GB"
    found = distinct_orders(budgets_of(gpus))
    assert len(found) <= MOST_ORDERS
    free = [[budget.free for budget in order] for order in found]
    assert sorted(free[0], reverse=True) == free[0] and sorted(free[0]) in free


def test_a_few_megabytes_make_no_card_unlike_another() -> None:
    one, other = limited(budgets_of("2x RTX 4090"), 23)
    nearly = type(one)(**{**vars(other), "free": other.free - GIB // 100})
    (order,) = distinct_orders((one, nearly))
    assert Counter(budget.device for budget in order) == Counter(["cuda:0", "cuda:1"])
