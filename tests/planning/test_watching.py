from __future__ import annotations

import pytest
import torch

from tworeel.planning.watching import Watch, fused_norms

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
    assert watch.work.traffic == 2 * SIZE and watch.work.weights == SIZE


def test_what_was_there_before_does_not_count() -> None:
    x = torch.randn(SIDE, SIDE)
    with Watch() as watch:
        x.t()
        assert watch.work.traffic == 0
        x.add_(1)
        assert watch.work.traffic == 2 * SIZE
        x.zero_()
    assert watch.peak == 0 and watch.work.traffic == 3 * SIZE


def test_numbers_with_gaps_between_them_cost_what_lies_in_the_gaps() -> None:
    x = torch.randn(SIDE, SIDE)
    out = torch.empty(SIDE, SIDE // 2)
    with Watch() as watch:
        out.copy_(x[:, ::2])
    assert watch.work.traffic == SIZE / 2 + SIZE
    with Watch() as watch:
        x[:, 0].sin()  # further apart than what is read at once
    assert watch.work.traffic == 8 * SIZE / SIDE + SIZE / SIDE
    with Watch() as watch:
        x.t().sin()  # a transposed matrix has no gaps
    assert watch.work.traffic == 2 * SIZE


@pytest.mark.parametrize("weight_dtype", [torch.bfloat16, torch.float32])
def test_a_norm_of_one_dtype_holds_its_input_and_a_number_a_row(weight_dtype: torch.dtype) -> None:
    norm = torch.nn.RMSNorm(SIDE, eps=1e-6, dtype=weight_dtype)
    norm.weight.requires_grad_(False)
    x = torch.randn(SIDE, SIDE, dtype=torch.bfloat16, requires_grad=True)
    with fused_norms(norm), Watch() as watch:
        y = norm(x)
        held = watch.live - y.untyped_storage().nbytes()
        (gradient,) = torch.autograd.grad(y, x, torch.ones_like(y))
    assert gradient.shape == x.shape
    assert (held == SIDE * 4) == (weight_dtype == torch.bfloat16)
    assert held >= SIDE * 4
