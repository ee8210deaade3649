"""What a graph holds and costs, on graphs small enough to count by hand."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from tworeel.planning.graphs import GraphReader
from tworeel.planning.work import Work, work_of

SIDE = 256
SIZE = SIDE * SIDE * 4
"""Bytes of a square fp32 matrix."""
PRODUCT = 2.0 * SIDE**3


def graph_of(function: Callable[..., object], inputs: int = 1) -> fx.Graph:
    with FakeTensorMode():
        return make_fx(function)(*(torch.empty(SIDE, SIDE) for _ in range(inputs))).graph


def test_what_lies_between_two_products_is_written_once() -> None:
    cost = GraphReader(graph_of(lambda x: ((x @ x).sin().cos() + 1) @ x)).cost()
    # The first product and what is made of it; then that and the second product.
    assert cost.peak == 2 * SIZE and cost.end == SIZE
    assert cost.work.products == {torch.float32: 2 * PRODUCT}
    assert cost.work.traffic == cost.work.weights == 2 * SIZE


def test_a_chain_without_products_is_one_pass() -> None:
    cost = GraphReader(graph_of(lambda x: (x.sin() * 2).cos())).cost()
    assert cost.work == Work({}, 0.0, 2 * SIZE, 1)
    assert cost.peak == cost.end == SIZE


def test_what_reads_the_same_is_written_by_one_kernel_and_needs_memory_at_once() -> None:
    def function(x: Tensor, y: Tensor) -> Tensor:
        made = x @ y
        return (made.sin() @ y) @ (made.cos() @ y)

    # The product; with both of what is made of it; one of them is free when it has been multiplied.
    assert GraphReader(graph_of(function, inputs=2)).cost().peak == 3 * SIZE


def test_a_kernel_that_waits_for_a_product_is_not_joined_with_what_that_is_made_from() -> None:
    def function(x: Tensor, y: Tensor) -> Tensor:
        first = y.sin() @ x
        return (y * first) @ x

    cost = GraphReader(graph_of(function, inputs=2)).cost()
    # The sine is free when the first product is there, and that when the second factor is.
    assert cost.peak == 2 * SIZE and cost.work.kernels == 4


def test_what_is_computed_from_many_values_is_written_once_if_it_is_used_again() -> None:
    def function(*inputs: Tensor) -> tuple[Tensor, Tensor]:
        many = sum(inputs[1:], inputs[0])
        return many[:1].sin(), many[1:].cos()

    few, enough = (GraphReader(graph_of(function, inputs=n)).cost().work.kernels for n in (4, 5))
    assert (few, enough) == (2, 3)


def test_what_takes_many_operations_is_written_where_it_is_used_again() -> None:
    def function(x: Tensor, y: Tensor) -> Tensor:
        made = ((x @ y) * 2).sin() + y
        return (made.cos() @ x) @ (made.exp() @ y)

    graph = graph_of(function, inputs=2)
    few, many = (GraphReader(graph, most_operations=most).cost().work.kernels for most in (5, 6))
    assert (few, many) == (7, 6)


def test_what_one_kernel_alone_needs_is_not_held() -> None:
    def function(x: Tensor, y: Tensor) -> Tensor:
        made = (x @ y).sin() + y
        return (made.cos() + made.exp()) @ x

    cost = GraphReader(graph_of(function, inputs=2), most_operations=1).cost()
    # The product, and what is made of it; the sum between them takes no memory.
    assert cost.peak == 2 * SIZE


def test_what_is_read_again_behind_a_sum_is_held() -> None:
    def function(x: Tensor, y: Tensor) -> Tensor:
        made = (x @ y).sin() + y
        return (made / made.amax(-1, keepdim=True)) @ x

    cost = GraphReader(graph_of(function, inputs=2), most_operations=1).cost()
    row = SIZE // SIDE
    assert cost.peak == 3 * SIZE + row


def test_parts_are_written_into_the_whole_if_one_of_them_is_written_anyway() -> None:
    def function(x: Tensor, y: Tensor) -> Tensor:
        first = (x @ y).sin() + y
        return torch.cat([first, y @ x]) @ x[:, :1]

    parts, at_once = (
        GraphReader(graph_of(function, inputs=2), most_operations=most).cost().peak for most in (1, 100)
    )
    # The whole with what one part is made of; the whole with both.
    assert (parts, at_once) == (3 * SIZE, 4 * SIZE)


def test_a_part_of_what_is_written_is_a_view() -> None:
    reader = GraphReader(graph_of(lambda x: (x @ x).split(SIDE // 2)))
    assert reader.cost().end == SIZE and len(set(reader.returned().values())) == 1


def test_views_take_no_memory_of_their_own() -> None:
    reader = GraphReader(graph_of(lambda x: ((x @ x).t(), (x @ x).view(-1))))
    assert reader.cost().end == 2 * SIZE
    assert len(reader.returned()) == 2


def test_two_views_of_one_value_are_one_value() -> None:
    def function(x: Tensor) -> tuple[Tensor, Tensor]:
        y = x @ x
        return y.t(), y.view(-1)

    reader = GraphReader(graph_of(function))
    assert reader.cost().end == SIZE
    assert len(set(reader.returned().values())) == 1


def test_released_inputs_are_free_after_their_last_use() -> None:
    graph = graph_of(lambda x, y: (x @ x) @ y, inputs=2)
    first, second = (node.name for node in graph.find_nodes(op="placeholder"))
    assert GraphReader(graph).cost().peak == 2 * SIZE
    # The first input's memory is free when the second product begins.
    released = GraphReader(graph, {first: "saved"}).cost()
    assert released.peak == SIZE and released.end == 0
    # Both are views of one thing that was saved: it is free only after the second.
    shared = GraphReader(graph, {first: "saved", second: "saved"}).cost()
    assert shared.peak == 2 * SIZE and shared.end == 0


def test_attention_is_counted_apart() -> None:
    query = torch.empty(1, 4, 64, 32)
    attention = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
    assert work_of(attention, (query, query, query), None).attention == 4 * 4 * 64 * 64 * 32


@pytest.mark.parametrize("sign", [1, -1])
def test_work_adds_up(sign: int) -> None:
    one = Work({torch.float32: 1.0}, 2.0, 3.0, 4, 5.0)
    other = Work({torch.int8: 4.0}, 5.0, 6.0, 7, 8.0)
    found = one + other if sign > 0 else one - other
    assert found.products == {torch.float32: 1.0, torch.int8: sign * 4.0}
    assert (found.attention, found.traffic, found.kernels) == (2 + sign * 5, 3 + sign * 6, 4 + sign * 7)
    assert found.weights == 5 + sign * 8


@pytest.mark.parametrize(("dtype", "held"), [(torch.float32, SIZE), (torch.int8, 0)])
def test_casts_of_weights_are_kept_and_copies_in_8_bits_are_not(dtype: torch.dtype, held: int) -> None:
    def function(weight: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        return x.sin(), weight.t().contiguous()

    with FakeTensorMode():
        weight = torch.empty(SIDE, SIDE, dtype=dtype)
        graph = make_fx(function)(weight, torch.empty(SIDE, SIDE)).graph
    reader = GraphReader(graph, num_weights=1)
    assert reader.cost().end == SIZE + held and len(reader.returned()) == 1


def test_one_weight_that_is_dequantized_is_counted_apart() -> None:
    def function(x: Tensor, first: Tensor, second: Tensor) -> Tensor:
        # The first one is needed once more when the second has been.
        weight = first.float()
        return x @ weight @ second.float() @ weight

    with FakeTensorMode():
        weights = [torch.empty(SIDE, SIDE, dtype=torch.int8) for _ in range(2)]
        graph = make_fx(function)(torch.empty(SIDE, SIDE), *weights).graph
    # Two products; and one of the two weights that are there by then.
    assert GraphReader(graph).cost().peak == 3 * SIZE
