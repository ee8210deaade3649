"""A forward whose own code between the blocks uses what was made before earlier blocks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.overrides import _get_current_function_mode_stack

from tworeel import Pipeline, split
from tworeel.engine import place
from tworeel.engine.passage import Passage
from tworeel.engine.strays import Strays
from tworeel.engine.streams import Arrival

WIDTH, BLOCKS = 6, 4


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(WIDTH, WIDTH)

    def forward(self, hidden: Tensor) -> Tensor:
        return hidden + self.layer(hidden).tanh()


class Hinted(nn.Module):
    """Hints from before the blocks are added behind each; `embed`, which runs first, is registered last."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(BLOCKS))
        self.injectors = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(2))
        self.head = nn.Linear(WIDTH, 2)
        self.embed = nn.Linear(3, WIDTH)

    def forward(self, inputs: Tensor) -> Tensor:
        first = self.embed(inputs)
        hints = torch.stack([first * i for i in range(BLOCKS)]).unbind()
        hidden = first
        for i, block in enumerate(self.blocks):
            hidden = block(hidden) + hints[i]
            if i % 2:
                hidden = hidden + self.injectors[i // 2](hidden)
                hidden[:, :1] = hidden[:, :1] * 2  # a write to what is here
        return self.head(hidden + first.mean())


HOW: dict[str, Any] = {
    "blocks": ["blocks"],
    "beside": {"injectors.0": "blocks.1", "injectors.1": "blocks.3"},
    "first": ["embed"],
}


def made() -> Hinted:
    torch.manual_seed(0)
    return Hinted().double()


def batches() -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(2, 3, generator=generator, dtype=torch.float64) for _ in range(4)]


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def unsplit() -> dict[str, Tensor]:
    model = made()
    for batch in batches():
        model(batch).square().sum().backward()
    return gradients(model)


@pytest.mark.parametrize("residency", ["keep", "recompute"])
@pytest.mark.parametrize("stages", [2, 3, 4])
def test_gradients_through_hints_are_those_of_the_model_that_is_not_split(
    stages: int, residency: str
) -> None:
    expected, alone, overlapping = unsplit(), made(), made()
    split(alone, ["cpu"] * stages, residency=residency, **HOW)
    for batch in batches():
        alone(batch).square().sum().backward()
    division = split(overlapping, ["cpu"] * stages, residency=residency, **HOW)
    Pipeline(division).step([(batch,) for batch in batches()], lambda output, _: output.square().sum())
    for ours in (gradients(alone), gradients(overlapping)):
        assert ours.keys() == expected.keys()
        for name, gradient in expected.items():
            torch.testing.assert_close(ours[name], gradient, rtol=1e-10, atol=1e-12)


class LikeTheFirst(nn.Module):
    """Its tail uses what was made on the first stage, and moves by itself what has to be there, too."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(BLOCKS))
        self.table = nn.Parameter(torch.randn(2, WIDTH), requires_grad=False)
        self.embed = nn.Linear(3, WIDTH).requires_grad_(False)

    def forward(self, inputs: Tensor) -> Tensor:
        hidden = first = self.embed(inputs)
        for block in self.blocks:
            hidden = block(hidden)
        shift, scale = (self.table.to(first.device) + first.mean(0)).chunk(2)
        ones = torch.ones(WIDTH, device=first.device)
        return hidden * (ones + scale.to(hidden.device)) + shift.to(device=hidden.device)


def to_meta(tensor: Tensor, device: torch.device, _: object, *, late: bool) -> Arrival:
    """`start_copy` for a device that has no streams."""
    return Arrival(tensor.to(device))


def test_the_tail_of_a_forward_moves_nothing_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """On the meta device, which gives nothing back: a copy from it would raise."""
    monkeypatch.setattr("tworeel.engine.passage.mark", lambda _: None)
    monkeypatch.setattr("tworeel.engine.passage.start_copy", to_meta)
    model = LikeTheFirst()
    model.blocks[2:].to("meta")
    split(model, ["cpu", "meta"], blocks=["blocks"], first=["embed"])
    assert model(torch.randn(2, 3)).device.type == "meta"


class Changing(nn.Module):
    """What was made first is changed in place behind the blocks."""

    def __init__(self, *, trained: bool) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(BLOCKS))
        self.embed = nn.Linear(3, WIDTH).requires_grad_(trained)

    def forward(self, inputs: Tensor) -> Tensor:
        hidden = first = self.embed(inputs)
        scale = first * 1
        for block in self.blocks:
            hidden = block(hidden + 0 * scale)
        before = hidden + scale
        scale *= 2
        return before + scale


def test_a_write_to_what_an_earlier_stage_has_made_is_refused_if_it_needs_a_gradient() -> None:
    division = split(Changing(trained=True), ["cpu", "cpu"], blocks=["blocks"], first=["embed"])
    with pytest.raises(RuntimeError, match="mul_ changes a tensor of an earlier stage in place"):
        Pipeline(division).step([(torch.randn(2, 3),)], lambda output, _: output.square().sum())


def test_a_constant_that_is_written_to_is_not_what_it_was_before(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tworeel.engine.passage.start_copy", to_meta)
    passage = Passage([torch.device("cpu"), torch.device("meta", 0)], gate=None)
    passage.stage = 1
    made = torch.ones(2)
    with Strays(passage):
        (first,) = passage.gather((made,))
        assert passage.gather((made,))[0] is first
        made *= 2
        assert passage.gather((made,))[0] is not first


def test_asking_for_a_size_copies_nothing_and_a_part_is_of_the_stage_of_its_whole() -> None:
    class Turned(Changing):
        def forward(self, inputs: Tensor) -> Tensor:
            hidden = first = self.embed(inputs).tanh()
            for block in self.blocks:
                hidden = block(hidden)
            assert first.size(0) == len(first) == 2
            return hidden + first.mT.mT

    torch.manual_seed(0)
    model, batch = Turned(trained=True), torch.randn(2, 3)
    model(batch).square().sum().backward()
    expected = gradients(model)
    model.zero_grad()
    division = split(model, ["cpu", "cpu"], blocks=["blocks"], first=["embed"])
    Pipeline(division).step([(batch,)], lambda output, _: output.square().sum())
    for name, gradient in gradients(model).items():
        torch.testing.assert_close(gradient, expected[name])


def test_a_hook_between_the_blocks_is_of_the_tensor_that_it_is_given_to() -> None:
    seen: list[Tensor] = []

    class Hooked(Changing):
        def forward(self, inputs: Tensor) -> Tensor:
            hidden = first = self.embed(inputs).tanh()
            for block in self.blocks:
                hidden = block(hidden)
            first.requires_grad_().register_hook(lambda gradient: seen.append(gradient.clone()))
            return hidden + first

    torch.manual_seed(0)
    model, batch = Hooked(trained=True), torch.randn(2, 3)
    model(batch).square().sum().backward()
    division = split(model, ["cpu", "cpu"], blocks=["blocks"], first=["embed"])
    Pipeline(division).step([(batch,)], lambda output, _: output.square().sum())
    whole, split_up = seen
    torch.testing.assert_close(split_up, whole)


@pytest.mark.slow
def test_code_between_blocks_may_be_compiled() -> None:
    class Compiling(Changing):
        def forward(self, inputs: Tensor) -> Tensor:
            hidden = self.embed(inputs)
            for block in self.blocks:
                hidden = block(hidden)
            return torch.compile(lambda x: x.tanh() + 1, fullgraph=True, backend="eager")(hidden)

    model, batch = Compiling(trained=False), torch.randn(2, 3)
    expected = model(batch)
    split(model, ["cpu", "cpu"], blocks=["blocks"], first=["embed"])
    torch.testing.assert_close(model(batch), expected)


def test_modules_see_no_mode() -> None:
    seen: list[Any] = []

    class Looking(Block):
        def forward(self, hidden: Tensor) -> Tensor:
            seen.extend(_get_current_function_mode_stack())
            return super().forward(hidden)

    model = made()
    model.blocks[3] = Looking().double()
    division = split(model, ["cpu", "cpu"], **HOW)
    Pipeline(division).step([(batch,) for batch in batches()], lambda output, _: output.square().sum())
    assert seen == []


def test_modules_live_with_their_block_and_what_is_not_behind_the_blocks_is_before_them() -> None:
    placement = place(made(), ["cpu", "cpu"], at=[2], **HOW)
    stages = {unit.name: unit.stage for unit in placement.units if not unit.is_block}
    assert stages == {"head": 1, "injectors.0": 0, "injectors.1": 1, "embed": 0}


def test_even_shares_count_what_is_beside_a_block() -> None:
    heavy = {**HOW, "beside": {"injectors.0": "blocks.0", "injectors.1": "blocks.0"}}
    assert place(made(), ["cpu", "cpu"], **heavy).boundaries == (0, 1, 4)


def test_a_module_or_block_that_is_not_there_is_named() -> None:
    with pytest.raises(ValueError, match=r"no such module or block: injectors\.9 beside blocks\.1"):
        place(made(), ["cpu", "cpu"], blocks=["blocks"], beside={"injectors.9": "blocks.1"})
