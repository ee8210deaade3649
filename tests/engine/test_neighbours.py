"""A split model beside what other libraries do: adapters outside of it, `.to(...)`, replaced forwards."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode

from tworeel import Pipeline, split
from tworeel.engine.neighbours import adapters_of
from tworeel.engine.split import find_split


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.register_buffer("scale", torch.ones(1))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.linear(x).tanh() * self.scale


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.enter = nn.Linear(4, 4)
        self.blocks = nn.ModuleList(Block() for _ in range(4))
        self.leave = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.enter(x)
        for block in self.blocks:
            x = block(x)
        return self.leave(x)


class Lora(nn.Module):
    """Outside of the model, in place of a layer's forward."""

    def __init__(self, layer: nn.Linear, dropout: float | None = None) -> None:
        super().__init__()
        self.down, self.up = nn.Linear(4, 2, bias=False), nn.Linear(2, 4, bias=False)
        self.dropout = dropout
        self.org_forward = layer.forward
        layer.forward = self.forward

    def forward(self, x: Tensor) -> Tensor:
        low = self.down(x)
        if self.dropout and self.training:
            low = nn.functional.dropout(low, self.dropout)
        return self.org_forward(x) + self.up(low)


def with_loras(model: Model, **options: float) -> list[Lora]:
    torch.manual_seed(1)
    layers = [model.enter, *(block.linear for block in model.blocks), model.leave]
    model.requires_grad_(False)
    return [Lora(layer, **options) for layer in layers]


def gradients(loras: list[Lora]) -> list[Tensor]:
    return [parameter.grad for lora in loras for parameter in lora.parameters()]


@pytest.mark.parametrize("together", [False, True])
@pytest.mark.parametrize("first", ["split", "loras"])
@pytest.mark.parametrize("residency", ["keep", "recompute"])
def test_loras_outside_of_the_model_get_the_gradients_of_the_unsplit_loop(first, residency, together):
    inputs = [torch.randn(2, 4) for _ in range(3)]
    theirs = Model()
    their_loras = with_loras(theirs)
    for x in inputs:
        theirs(x).square().mean().backward()
    model = Model()
    loras = with_loras(model) if first == "loras" else []
    division = split(model, ["cpu"] * 2, residency=residency)
    loras = loras or with_loras(model)
    if together:
        Pipeline(division).step(inputs, lambda output, _: output.square().mean())
    else:
        for x in inputs:
            model(x).square().mean().backward()
    for ours, expected in zip(gradients(loras), gradients(their_loras), strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("first", ["split", "loras"])
def test_adapters_are_found_on_every_layer_also_one_over_the_other(first):
    model = Model()
    loras = [*with_loras(model), *with_loras(model)] if first == "loras" else []
    division = split(model, ["cpu"] * 2)
    loras = loras or [*with_loras(model), *with_loras(model)]
    found = adapters_of(model)
    assert set(found) == set(loras)
    assert [found[lora] for lora in loras[6:]] == [found[lora] for lora in loras[:6]]
    assert found[loras[2]] == "blocks.1.linear"
    division.remove()
    assert set(adapters_of(model)) == set(loras)


def test_adapters_are_found_also_where_modules_hold_each_other_or_one_is_missing():
    model = Model()
    model.blocks[1].add_module("owner", model.blocks)
    model.blocks[1].add_module("nothing", None)
    assert adapters_of(model) == {}
    lora = Lora(model.blocks[1].linear)
    assert adapters_of(model) == {lora: "blocks.1.linear"}


def test_adapters_go_where_their_layers_are():
    model = Model()
    loras = with_loras(model)
    division = split(model, ["cpu", "cpu"])
    object.__setattr__(division.placement, "devices", (torch.device("cpu"), torch.device("meta")))
    division.place_adapters()
    assert [lora.up.weight.device.type for lora in loras] == ["cpu"] * 3 + ["meta"] * 3


def test_every_forward_places_the_adapters():
    model = Model()
    loras = with_loras(model)
    division = split(model, ["cpu", "cpu"])
    calls = []
    division.place_adapters = lambda: calls.append(1)
    model(torch.ones(1, 4)).sum().backward()
    Pipeline(division).step([torch.ones(1, 4)] * 3, lambda output, _: output.sum())
    assert len(calls) == 2
    assert loras[0].up.weight.grad is not None


def test_dropout_of_an_adapter_is_redrawn_alone_and_refused_in_a_pipeline():
    model = Model()
    loras = with_loras(model, dropout=0.5)
    expected = []
    for residency in ("keep", "recompute", "selective"):
        division = split(model, ["cpu", "cpu"], residency=residency)
        for lora in loras:
            lora.zero_grad()
        torch.manual_seed(7)
        model(torch.ones(1, 4)).sum().backward()
        expected = expected or [grad.clone() for grad in gradients(loras)]
        assert all(map(torch.equal, gradients(loras), expected))
        if residency != "keep":
            with pytest.raises(ValueError, match=r"blocks\.0\.linear: dropout of 0\.5 in its adapter"):
                Pipeline(division).step([torch.ones(1, 4)], lambda output, _: output.sum())
        division.remove()


def test_a_block_whose_forward_was_replaced_is_refused_by_name_and_nothing_is_changed():
    model = Model()
    Lora(model.blocks[2])
    message = r"blocks\.2: the forward of Block is replaced already, by Lora; split the model before"
    with pytest.raises(ValueError, match=message):
        split(model, ["cpu", "cpu"])
    assert find_split(model) is None
    assert [name for name, module in model.named_modules() if "forward" in vars(module)] == ["blocks.2"]


def test_a_moved_model_goes_to_its_own_devices_and_off_them():
    model = Model()
    division = split(model, ["cpu", "cpu"])
    object.__setattr__(division.placement, "devices", (torch.device("cuda:0"), torch.device("cuda:1")))
    parts = [model.enter, model.blocks[0], model.blocks[3], model.leave]
    with FakeTensorMode():
        for module in model.modules():
            module._parameters.clear()  # a module cannot move fake ones
            module._buffers.clear()
        for part in parts:
            part.register_buffer("scale", torch.empty(1))

        def devices() -> list[str]:
            return [str(part.scale.device) for part in parts]

        assert model.to("cuda:0") is model
        assert devices() == ["cuda:0", "cuda:0", "cuda:1", "cuda:1"]
        model.to("cuda:1", torch.float64)
        assert devices() == ["cuda:0", "cuda:0", "cuda:1", "cuda:1"]
        assert model.leave.scale.dtype == torch.float64
        nn.ModuleList([model]).to("cpu")
        assert devices() == ["cpu"] * 4
        division.remove()
        model.to("cuda:0")
        assert devices() == ["cuda:0"] * 4


def test_a_moved_gradient_goes_with_its_parameter():
    model = Model()
    model.leave.weight.grad = torch.zeros(4, 4)
    division = split(model, ["cpu", "cpu"])
    homes = division._homes()
    assert homes[id(model.leave.weight.grad)] == homes[id(model.leave.weight)]
    weight = model.leave.weight
    assert model.to("cpu", torch.float64).leave.weight is weight
    assert weight.grad.dtype == torch.float64


def test_a_split_model_says_where_its_parts_are():
    model = Model()
    division = split(model, ["cpu", "cpu"])
    assert list(model.hf_device_map) == ["enter", *(f"blocks.{i}" for i in range(4)), "leave"]
    assert set(division.device_map.values()) == {torch.device("cpu")}
    division.remove()
    assert not hasattr(model, "hf_device_map")


def test_what_the_forward_returns_comes_back_to_the_first_device_where_asked():
    model = Model()
    division = split(model, ["cpu", "cpu"], io_same_device=True)
    object.__setattr__(division.placement, "devices", (torch.device("meta"), torch.device("cpu")))
    assert division.bring_home((torch.ones(1), "word"))[0].device.type == "meta"
    division.io_same_device = False
    assert division.bring_home(torch.ones(1)).device.type == "cpu"


@pytest.mark.parametrize("own", [None, {"": "cpu"}])
def test_a_model_whose_split_is_removed_is_as_before_also_where_a_forward_is_gone(own):
    model = Model()
    if own is not None:
        model.hf_device_map = own
    division = split(model, ["cpu", "cpu"])
    del model.blocks[0].forward
    division.remove()
    assert getattr(model, "hf_device_map", None) == own
    assert not any("forward" in module.__dict__ for module in model.modules())
    assert copy.deepcopy(model).leave.weight is not model.leave.weight


def test_a_split_model_is_not_copied_with_forwards_that_have_the_first_ones_weights():
    model = Model()
    split(model, ["cpu", "cpu"])
    with pytest.raises(RuntimeError, match="a model that is split cannot be copied"):
        torch.optim.swa_utils.AveragedModel(model)


def test_a_split_is_found_behind_wrappers():
    model = Model()
    division = split(model, ["cpu", "cpu"])
    inner = model.forward

    def outer(*args: Tensor) -> Tensor:
        return inner(*args)

    outer.__wrapped__ = inner
    model.forward = outer
    assert find_split(model) is division
    assert find_split(copy.copy(nn.Linear(1, 1))) is None
