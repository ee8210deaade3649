from __future__ import annotations

import itertools
import math

import pytest

from tworeel.planning.boundaries import MOST_TRIED, Way, is_rising, neighbours, shares, within_host


@pytest.mark.parametrize(
    ("weights", "blocks", "boundaries"),
    [
        ((1, 1), 40, (20,)),
        ((2, 1, 1), 40, (20, 30)),
        ((1, 0.01, 1), 10, (5, 6)),
        ((0.01, 0.01, 9), 3, (1, 2)),
        ((0.0, 0.0, 0.0), 6, (2, 4)),
    ],
)
def test_shares_follow_the_weights_and_leave_every_stage_a_block(
    weights: tuple[float, ...], blocks: int, boundaries: tuple[int, ...]
) -> None:
    assert shares(weights, blocks) == boundaries


@pytest.mark.parametrize("host", [0, 20, 26, 31, 36, 100])
@pytest.mark.parametrize("num_stages", [1, 2, 3, 4])
def test_no_other_boundaries_within_host_memory_have_a_faster_slowest_stage(
    num_stages: int, host: int
) -> None:
    """A stage is fast with all its blocks on the host, or slow with one fewer for each block that it has."""

    def ways(stage: int, blocks: range) -> list[Way]:
        count = len(blocks)
        both = [(count * (1.0 + 0.3 * stage), 3 * count), (count * 2.0, 3 * count - min(count, 5))]
        return both if count < 7 else both[1:]

    def slowest(at: tuple[int, ...]) -> float:
        """Of the fastest ways that the host has memory for."""
        each = [ways(i, range(*ends)) for i, ends in enumerate(itertools.pairwise((0, *at, 12)))]
        chosen = (c for c in itertools.product(*each) if sum(taken for _, taken in c) <= host)
        return min((max(seconds for seconds, _ in c) for c in chosen), default=math.inf)

    tried = {at: slowest(at) for at in itertools.combinations(range(1, 12), num_stages - 1)}
    found = within_host(ways, num_stages, 12, host)
    assert (found is None) == all(map(math.isinf, tried.values()))
    assert found is None or tried[found] == min(tried.values())


def test_of_many_blocks_not_every_boundary_is_tried() -> None:
    tried = set()

    def ways(stage: int, blocks: range) -> list[Way]:
        tried.add((stage, blocks))
        return [(float(len(blocks)), 0)]

    found = within_host(ways, 8, 60, 0)
    assert found is not None and is_rising((0, *found, 60)) and len(tried) <= MOST_TRIED
    assert max(b - a for a, b in itertools.pairwise((0, *found, 60))) <= 10


def test_neighbours_have_as_many_boundaries_moved() -> None:
    assert set(neighbours((2,), 4, 1)) == {(1,), (3,)}
    one, two = (set(neighbours((2, 4, 6), 8, moved)) for moved in (1, 2))
    assert (1, 4, 6) in one and (3, 5, 6) in two and (3, 4, 5) in two
    assert not one & two and (2, 4, 6) not in one | two and (3, 5, 7) not in one | two
    assert all(is_rising((0, *at, 8)) for at in one | two)


def test_neighbours_never_leave_a_stage_without_blocks() -> None:
    assert not [*neighbours((1, 2), 3, 1), *neighbours((1, 2), 3, 2)]
