"""Boundaries between stages: where a search begins, and where it goes on."""

from __future__ import annotations

import itertools
from bisect import bisect_left
from collections.abc import Callable, Iterator, Mapping, Sequence

MOST_TRIED = 600
"""Stages that are looked at for boundaries that the host has memory for."""

Way = tuple[float, int]
"""Seconds that a stage takes, and bytes of host memory."""


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


def within_host(
    ways: Callable[[int, range], Sequence[Way]], num_stages: int, num_blocks: int, host: int
) -> tuple[int, ...] | None:
    """The boundaries whose slowest stage is the fastest, of those that the host has memory for.

    Of many blocks and stages not every boundary is tried, but the second, the third, ….

    Args:
        ways: how a stage with some blocks may run, where it fits its device.
        num_stages: how many there are.
        num_blocks: that they share.
        host: bytes of its memory.

    Returns:
        None where there are none.
    """
    step = next(n for n in itertools.count(1) if _number(num_stages, -(-num_blocks // n)) <= MOST_TRIED)
    places = [*range(0, num_blocks, step), num_blocks]
    known = {
        (stage, first, stop): ways(stage, range(first, stop))
        for stage in range(num_stages)
        for first, stop in itertools.combinations(places, 2)
        if (first == 0) == (stage == 0) and (stop == num_blocks) == (stage == num_stages - 1)
    }
    lengths = sorted({seconds for found in known.values() for seconds, _ in found})

    def has_room(seconds: float) -> bool:
        found = _lightest(known, num_stages, num_blocks, seconds)
        return found is not None and found[0] <= host

    fastest = bisect_left(lengths, True, key=has_room)
    if fastest == len(lengths):
        return None
    found = _lightest(known, num_stages, num_blocks, lengths[fastest])
    assert found is not None, "it had room"
    return found[1][:-1]


def _number(num_stages: int, num_places: int) -> int:
    """Of stages between places: the first begins at the first, the last ends at the last."""
    return 2 * num_places + (num_stages - 2) * num_places * (num_places - 1) // 2


def _lightest(
    known: Mapping[tuple[int, int, int], Sequence[Way]], num_stages: int, num_blocks: int, most: float
) -> tuple[int, tuple[int, ...]] | None:
    """The least host memory with which no stage takes longer, and where each stage ends."""
    best: dict[tuple[int, int], tuple[int, tuple[int, ...]]] = {(0, 0): (0, ())}
    for (stage, first, stop), found in known.items():  # stage by stage
        fitting = [host for seconds, host in found if seconds <= most]
        if fitting and (before := best.get((stage, first))) is not None:
            one = before[0] + min(fitting), (*before[1], stop)
            best[stage + 1, stop] = min(best.get((stage + 1, stop), one), one)
    return best.get((num_stages, num_blocks))


def is_rising(boundaries: Sequence[int]) -> bool:
    """Whether every stage between these has a block."""
    return all(a < b for a, b in itertools.pairwise(boundaries))
