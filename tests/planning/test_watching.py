from __future__ import annotations

import torch

from tworeel.planning.watching import Watch

SIDE = 64
SIZE = SIDE * SIDE * 4


def test_what_is_let_go_no_longer_counts() -> None:
    x = torch.randn(SIDE, SIDE)
    with Watch() as watch:
        first = x.sin()
        second = first @ x
        assert watch.live == 2 * SIZE
        del first
        assert watch.live == SIZE
        second.t()  # a view is no new memory
        assert (watch.live, watch.peak) == (SIZE, 2 * SIZE)
    assert watch.work.products == {torch.float32: 2.0 * SIDE**3}
    assert watch.work.traffic == 2 * SIZE


def test_what_was_there_before_does_not_count() -> None:
    x = torch.randn(SIDE, SIDE)
    with Watch() as watch:
        x.add_(1)
        x.t()
    assert watch.peak == 0 and watch.work.traffic == 0
