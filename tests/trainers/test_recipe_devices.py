"""The recipes on distinct devices: fake ones, as here no operation may mix two of them."""

from __future__ import annotations

import pytest
import stand_ins
import torch
from torch import nn
from torch._subclasses import FakeTensorMode

from fake_tensors import make_fake
from tworeel import Pipeline, split
from tworeel.engine.neighbours import adapters_of
from tworeel.engine.split import Split

DEVICES = [torch.device("cpu:1"), torch.device("cpu:2")]
FIRST = ["double_stream_modulation_img", "single_stream_modulation"]


def make(mode: FakeTensorMode, checkpointing: str, first: list[str]) -> tuple[Split, nn.Module]:
    transformer = stand_ins.Flux2(checkpointing).requires_grad_(False)
    division = split(transformer, ["cpu", "cpu"], first=first, io_same_device=True)
    network = stand_ins.Network(transformer)
    object.__setattr__(division.placement, "devices", tuple(DEVICES))
    make_fake(transformer, division.placement.device_of, mode)
    for adapter, layer in adapters_of(transformer).items():
        make_fake(adapter, lambda _, layer=layer: division.placement.device_of(layer), mode)
    return division, network


def batch(mode: FakeTensorMode) -> dict:
    with mode:
        x, ctx = torch.empty(1, 5, 8, device=DEVICES[0]), torch.empty(1, 3, 8, device=DEVICES[0])
        return {"x": x, "timesteps": torch.empty(1, device=DEVICES[0]), "ctx": ctx}


def assert_gradients_lie_with_their_layers(division: Split, network: nn.Module) -> None:
    devices = set()
    for adapter, layer in adapters_of(division.model).items():
        for parameter in adapter.parameters():
            assert parameter.grad.device == division.placement.device_of(layer)
            devices.add(parameter.grad.device)
    assert devices == set(DEVICES)


@pytest.mark.parametrize("first", [[], FIRST])
@pytest.mark.parametrize("checkpointing", ["", "inside", "outside"])
def test_a_plain_loop_mixes_no_devices_and_has_its_loss_on_the_first(checkpointing, first):
    mode = FakeTensorMode()
    division, network = make(mode, checkpointing, first)
    with mode:
        output = division.model(**batch(mode))
        assert output.device == DEVICES[0]
        output.square().mean().backward()
    assert_gradients_lie_with_their_layers(division, network)


@pytest.mark.parametrize("checkpointing", ["", "inside", "outside"])
def test_a_pipeline_mixes_no_devices_and_has_its_loss_on_the_last(checkpointing):
    mode = FakeTensorMode()
    division, network = make(mode, checkpointing, FIRST)

    def forward(model: nn.Module, inputs: dict) -> torch.Tensor:
        with mode:
            return model(**inputs)

    pipeline = Pipeline(division, forward=forward)
    result = pipeline.step([batch(mode)], lambda output, _: output.square().mean())
    assert result.losses[0].device == DEVICES[1]
    assert_gradients_lie_with_their_layers(division, network)
