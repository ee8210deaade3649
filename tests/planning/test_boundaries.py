from __future__ import annotations

import pytest

from tworeel.planning.boundaries import is_rising, neighbours, shares


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


def test_neighbours_have_as_many_boundaries_moved() -> None:
    assert set(neighbours((2,), 4, 1)) == {(1,), (3,)}
    one, two = (set(neighbours((2, 4, 6), 8, moved)) for moved in (1, 2))
    assert (1, 4, 6) in one and (3, 5, 6) in two and (3, 4, 5) in two
    assert not one & two and (2, 4, 6) not in one | two and (3, 5, 7) not in one | two
    assert all(is_rising((0, *at, 8)) for at in one | two)


def test_neighbours_never_leave_a_stage_without_blocks() -> None:
    assert not [*neighbours((1, 2), 3, 1), *neighbours((1, 2), 3, 2)]
