"""In which orders unlike devices may take the stages."""

from __future__ import annotations

import itertools
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from math import factorial, prod
from typing import Any

from tworeel.planning.budgets import Budget
from tworeel.units import GIB

MOST_ORDERS = 120
"""All of five unlike devices; of more, those sorted by memory, and each with two places exchanged."""
_Kind = tuple[Any, ...]


def distinct_orders(budgets: Sequence[Budget]) -> list[tuple[Budget, ...]]:
    """The devices in each order that makes a difference, whatever order they are given in.

    Args:
        budgets: of the devices; alike are those of the same card with about the same memory.
    """
    alike: dict[_Kind, list[Budget]] = defaultdict(list)
    for budget in budgets:
        alike[_kind(budget)].append(budget)
    counts = {kind: len(alike[kind]) for kind in sorted(alike)}
    return [_filled(order, alike) for order in _arrangements(counts)]


def _kind(budget: Budget) -> _Kind:
    """Most memory first; what other programs take of a device differs a little from minute to minute."""
    return -round(4 * budget.free / GIB), budget.card, budget.total, budget.slowdown


def _arrangements(counts: Mapping[_Kind, int]) -> list[tuple[_Kind, ...]]:
    number = factorial(sum(counts.values())) // prod(map(factorial, counts.values()))
    by_memory = tuple(Counter(counts).elements())
    found = _all(counts) if number <= MOST_ORDERS else _exchanged(by_memory)
    return list(dict.fromkeys(found))


def _all(counts: Mapping[_Kind, int]) -> Iterator[tuple[_Kind, ...]]:
    """Each once: permutations of the devices would name those of alike ones many times."""
    if not any(counts.values()):
        yield ()
    for kind, count in counts.items():
        if count:
            yield from ((kind, *rest) for rest in _all({**counts, kind: count - 1}))


def _exchanged(order: tuple[_Kind, ...]) -> Iterator[tuple[_Kind, ...]]:
    """The order and its reverse, and each with two of its places exchanged."""
    for way in (order, order[::-1]):
        yield way
        for i, j in itertools.combinations(range(len(way)), 2):
            other = list(way)
            other[i], other[j] = way[j], way[i]
            yield tuple(other)


def _filled(order: Sequence[_Kind], alike: Mapping[_Kind, Sequence[Budget]]) -> tuple[Budget, ...]:
    left = {kind: iter(budgets) for kind, budgets in alike.items()}
    return tuple(next(left[kind]) for kind in order)
