"""Boundaries between stages: where a search begins, and where it goes on."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence


def neighbours(at: tuple[int, ...], num_blocks: int, moved: int) -> Iterator[tuple[int, ...]]:
    """The boundaries with so many of them moved by a block."""
    for chosen in itertools.combinations(range(len(at)), moved):
        for moves in itertools.product((-1, 1), repeat=moved):
            near = list(at)
            for position, move in zip(chosen, moves, strict=True):
                near[position] += move
            if is_rising((0, *near, num_blocks)):
                yield tuple(near)


def shares(weights: Sequence[float], num_blocks: int) -> tuple[int, ...]:
    """The boundaries of shares in these proportions, equal ones if all are 0, each of at least one block."""
    weights = weights if any(weights) else [1.0] * len(weights)
    ends = [num_blocks * part / sum(weights) for part in itertools.accumulate(weights)]
    last = num_blocks - len(weights)
    found: list[int] = []
    for number, end in enumerate(ends[:-1]):
        least = found[-1] + 1 if found else 1
        found.append(min(max(round(end), least), last + number + 1))
    return tuple(found)


def is_rising(boundaries: Sequence[int]) -> bool:
    """Whether every stage between these has a block."""
    return all(a < b for a, b in itertools.pairwise(boundaries))
