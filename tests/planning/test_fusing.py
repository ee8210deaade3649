"""Which values one kernel writes, on graphs small enough to see it."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from tworeel.planning.fusing import kernels_of
from tworeel.planning.written import WrittenValues

SIDE = 256


def kernels(function: Callable[..., object], *inputs: Tensor) -> list[set[str]]:
    """The names of operations in each, in order."""
    with FakeTensorMode(allow_non_fake_inputs=True):
        graph = make_fx(function)(*inputs).graph
    written = WrittenValues(graph, {})
    found = kernels_of(written.by_operation(), written.reads)
    return [{operation(value) for value in kernel} for kernel in found]


def operation(value: fx.Node) -> str:
    return value.target.overloadpacket.__name__  # type: ignore[union-attr]


def square() -> Tensor:
    return torch.empty(SIDE, SIDE, device="meta")


def test_what_reads_a_large_value_is_joined() -> None:
    found = kernels(lambda x: (x.sin() @ x, x.cos() @ x), square())
    assert {"sin", "cos"} in found


def test_what_shares_a_row_is_left_apart_if_it_could_use_the_same_memory() -> None:
    def function(x: Tensor, y: Tensor, row: Tensor) -> tuple[Tensor, Tensor]:
        return ((x @ y).sin() + row) @ x, ((y @ x).cos() * row) @ y

    found = kernels(function, square(), square(), torch.empty(SIDE, device="meta"))
    assert {"add"} in found and {"mul"} in found


def test_what_lies_far_apart_is_not_joined() -> None:
    def function(between: int, x: Tensor) -> Tensor:
        made = x.sin() @ x
        for _ in range(between):
            made = made @ x
        return x.cos() @ made

    near, far = (kernels(partial(function, between), square()) for between in (60, 70))
    assert {"sin", "cos"} in near
    assert {"sin"} in far and {"cos"} in far


def test_what_a_sum_is_given_and_gives_is_computed_with_it() -> None:
    def function(x: Tensor) -> tuple[Tensor, Tensor]:
        scale = x.abs().amax(-1, keepdim=True).clamp_min(1e-6)
        return (x / scale) @ x, scale

    assert kernels(function, square()) == [{"amax", "clamp_min", "div"}, {"mm"}]
