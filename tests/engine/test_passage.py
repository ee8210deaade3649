"""What is held of a tensor that goes from stage to stage."""

from __future__ import annotations

import weakref

import pytest
import torch
from torch import Tensor, nn
from toy_wan import make_micro_batch, make_wan, square_loss

from tworeel import Pipeline
from tworeel.engine import parking
from tworeel.engine.passage import Cut


class Adding(nn.Module):
    def __init__(self, value: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.full((4,), value))

    def forward(self, x: Tensor) -> Tensor:
        x += self.weight
        return x.sin() * self.weight


class Chain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Adding(value) for value in (0.5, 1.0, 1.5, 2.0))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x


def test_what_a_stage_has_made_is_let_go_when_the_next_one_has_begun() -> None:
    model, made = make_wan("t2v", torch.float32), []
    pipeline = Pipeline(model, ["cpu", "cpu"], at=[1], residency="recompute")
    model.blocks[0].register_forward_hook(lambda _block, _args, output: made.append(weakref.ref(output)))

    def loss(output, batch) -> Tensor:
        assert [tensor() for tensor in made] == [None]
        return square_loss(output, batch)

    pipeline.step([make_micro_batch("t2v", torch.float32, 0)], loss)


@pytest.mark.parametrize(("residency", "is_held"), [("recompute", True), ("offload", False)])
def test_what_a_stage_was_given_is_held_where_its_first_block_leaves_it(
    residency: str, is_held: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    given, begin = [], Cut.begin

    def watched(cut: Cut, there: Tensor) -> Tensor:
        tensor = begin(cut, there)
        given.append(weakref.ref(tensor))
        return tensor

    monkeypatch.setattr(Cut, "begin", watched)
    monkeypatch.setattr(parking, "SMALLEST", 0)

    def loss(output, batch) -> Tensor:
        assert [tensor() is not None for tensor in given[:1]] == [is_held]
        return square_loss(output, batch)

    pipeline = Pipeline(make_wan("t2v", torch.float32), ["cpu", "cpu"], at=[1], residency=residency)
    pipeline.step([make_micro_batch("t2v", torch.float32, 0)], loss)


def test_a_block_may_change_in_place_what_its_stage_was_given() -> None:
    ours, theirs, x = Chain(), Chain(), torch.linspace(0, 1, 4)
    theirs(x.clone()).sum().backward()
    Pipeline(ours, ["cpu", "cpu"], blocks=["blocks"]).step([x.clone()], lambda output, _: output.sum())
    for our, their in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(our.grad, their.grad)
