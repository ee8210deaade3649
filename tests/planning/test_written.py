"""Which values are written, where norms are left whole."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from tworeel.engine import norms  # noqa: F401  # whose operations are called
from tworeel.planning.written import WrittenValues

ROWS, WIDTH = 64, 256


def written(function: Callable[..., object], inputs: int = 1) -> list[str]:
    """The operations of all that is written, in order."""
    with FakeTensorMode():
        graph = make_fx(function)(
            *(torch.empty(ROWS, WIDTH, dtype=torch.bfloat16) for _ in range(inputs))
        ).graph
    values = WrittenValues(graph, {})
    assert all(value in values.reads or value.op == "placeholder" for value in values.kept)
    return [str(value.target).removeprefix("aten.").split(".")[0] for value in values.reads]


def norm(x: Tensor) -> Tensor:
    normed, *_ = torch.ops.tworeel.layer_norm(x, [WIDTH], None, None, 1e-6)
    return normed


def test_a_cast_is_made_anew_for_each_norm() -> None:
    def function(x: Tensor) -> tuple[Tensor, Tensor]:
        cast = x.float()
        return norm(cast), norm(cast)

    assert written(function).count("clone") == 2


def test_what_is_made_of_two_values_is_written_once_for_all_norms() -> None:
    def function(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        made = x + y
        return norm(made), norm(made)

    found = written(function, inputs=2)
    assert found.count("add") == 1 and "clone" not in found


@pytest.mark.parametrize("also", ["a product", "the caller"])
def test_a_cast_that_is_needed_elsewhere_is_written_once(also: str) -> None:
    def function(x: Tensor) -> tuple[Tensor, ...]:
        cast = x.float()
        return norm(cast), norm(cast), cast @ cast.t() if also == "a product" else cast

    assert "clone" not in written(function)


def test_an_attention_copies_the_part_that_it_reads_of_what_is_not_written() -> None:
    def function(x: Tensor, y: Tensor) -> Tensor:
        q, k = (t[:, :WIDTH].clone() for t in (x, y))
        v = torch.cat([x, y], dim=1).sin()[:, :WIDTH]
        heads = (t.reshape(1, ROWS, -1, 16).transpose(1, 2) for t in (q, k, v))
        return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(*heads)[0]

    found = written(function, inputs=2)
    assert found.count("clone") == 3 and "sin" not in found
