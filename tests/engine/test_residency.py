from __future__ import annotations

import torch
from toy_wan import make_micro_batch, make_wan, square_loss

from tworeel import Pipeline
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
