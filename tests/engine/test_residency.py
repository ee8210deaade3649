from __future__ import annotations

import weakref

import pytest
import torch
from toy_wan import make_micro_batch, make_wan, square_loss

from tworeel import Pipeline, split
from tworeel.engine import compiling, parking
from tworeel.engine.host_pool import HostPool
from tworeel.engine.residency import Residency, run_block


class Scale(torch.nn.Module):
    """A block with a constant beside its input."""

    def forward(self, h: torch.Tensor, *, text: torch.Tensor) -> torch.Tensor:
        return h * text.sum()


def saved_bytes(residency: str) -> int:
    """Bytes that autograd holds on the device for the backward of one block."""
    block = torch.nn.Sequential(torch.nn.Linear(64, 256), torch.nn.GELU(), torch.nn.Linear(256, 64))
    held: list[int] = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        held.append(tensor.nbytes if not isinstance(tensor, torch.nn.Parameter) else 0)
        return tensor

    x = torch.randn(32, 64, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        run_block(block, (x,), {}, residency=Residency(residency))
    return sum(held)


def test_recompute_holds_the_input_only():
    assert saved_bytes("recompute") == 32 * 64 * 4
    assert saved_bytes("keep") > 5 * saved_bytes("recompute")


def test_constants_are_captured_once_and_not_held_per_block():
    held: list[torch.Size] = []
    text = torch.randn(5, 64)

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        held.append(tensor.shape)
        return tensor

    x = torch.randn(32, 64, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        run_block(Scale(), (x,), {"text": text}, residency=Residency.RECOMPUTE)
    assert held == [x.shape]


class Trained(torch.nn.Module):
    """A block with a weight that is trained."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(64))

    def forward(self, h: torch.Tensor, *, text: torch.Tensor) -> torch.Tensor:
        return h * self.weight * text.sum()


def test_the_first_blocks_hidden_state_is_parked_although_it_needs_no_gradient():
    pool, text = HostPool(), torch.randn(5, 64)
    hidden = torch.randn(512, 64)
    expected = text.sum() * hidden.sum(0)
    gone = weakref.ref(hidden)
    berth, block = parking.Berth(pool), Trained()
    output = run_block(block, (hidden,), {"text": text}, residency=Residency.OFFLOAD, berth=berth)
    del hidden
    assert gone() is None and pool.held >= 512 * 64 * 4
    output.sum().backward()
    torch.testing.assert_close(block.weight.grad, expected, rtol=1e-4, atol=1e-3)


def test_recompute_runs_each_block_twice_and_keep_once():
    def count(residency: str) -> int:
        calls: list[int] = []
        model = make_wan("t2v", torch.float32)
        for block in model.blocks:
            block.ffn.register_forward_hook(lambda *_: calls.append(1))
        pipeline = Pipeline(model, ["cpu", "cpu"], residency=residency)
        pipeline.step([make_micro_batch("t2v", torch.float32, 0)], square_loss)
        return len(calls)

    assert [count(r) for r in Residency] == [5, 10, 10, 10, 10]


RAN: list[int] = []
"""One for each time that `counted` ran."""


@torch.library.custom_op("tworeel_tests::counted", mutates_args=())
def counted(x: torch.Tensor) -> torch.Tensor:
    """Another library's attention: 2 x."""
    RAN.append(1)
    return x * 2


counted.register_autograd(lambda _, gradient: gradient * 2)
counted.register_fake(torch.empty_like)


class Counted(torch.nn.Module):
    """A block with an operation that torch does not know."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = torch.nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return counted(self.linear(x)).sigmoid()


class Model(torch.nn.Module):
    """Three of them."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = torch.nn.ModuleList(Counted() for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = block(x)
        return x


@pytest.mark.parametrize("compile", [False, True])
@pytest.mark.parametrize("residency", ["selective", "offload-selective"])
def test_other_operations_can_be_chosen_to_be_kept(monkeypatch, residency, compile):
    monkeypatch.setattr(parking, "SMALLEST", 0)
    monkeypatch.setattr(compiling, "BACKEND", "aot_eager")

    def run(kept_ops: list[object]) -> tuple[int, list[torch.Tensor]]:
        torch.manual_seed(0)
        model = Model()
        division = split(model, ["cpu"], residency=residency, kept_ops=kept_ops, compile=compile)
        RAN.clear()
        Pipeline(division).step([torch.ones(2, 4)], lambda output, _: output.sum())
        assert not compile or not division.compiler.failed
        return len(RAN), [parameter.grad for parameter in model.parameters()]

    again, expected = run([])
    once, found = run([torch.ops.tworeel_tests.counted.default])
    assert (again, once) == (6, 3)
    torch.testing.assert_close(found, expected)
