"""The page's recipe for ai-toolkit, on a stand-in with its LoRA mechanism and checkpoints around blocks."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import stand_ins
import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode

from fake_tensors import make_fake
from tworeel.engine.neighbours import adapters_of
from tworeel.engine.split import find_split

EXAMPLE = stand_ins.example("flux2_model.py")
OF_THE_MIXIN = EXAMPLE.index("# toolkit/network_mixins.py")
LOADING, MULTIPLYING = EXAMPLE[:OF_THE_MIXIN], EXAMPLE[OF_THE_MIXIN:]
"""The edits of the two files."""
DEVICES = (torch.device("cpu:1"), torch.device("cpu:2"))


class Lora(stand_ins.Lora):
    """As `ToolkitModuleMixin`: multiplied with what all modules of the network share."""

    def __init__(self, layer: nn.Linear, multiplier: list[Tensor], *, edited: bool = True) -> None:
        super().__init__(layer)
        self.shared, self.edit = multiplier, MULTIPLYING if edited else ""

    def forward(self, x: Tensor) -> Tensor:
        lora_output = self.lora_up(self.lora_down(x)) * self.alpha / 2
        names = {"lora_output": lora_output, "multiplier": self.shared[0]}
        exec(self.edit, names)
        return self.org_forward(x) + lora_output * names["multiplier"]


def network_of(transformer: nn.Module, multiplier: Tensor, *, edited: bool = True) -> stand_ins.Network:
    kind: Callable[[nn.Linear], Lora] = partial(Lora, multiplier=[multiplier], edited=edited)
    return stand_ins.Network(transformer, kind=kind)


def train(split: bool, checkpointing: str) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """As its process: load, move, build and place the network, prepare both, move again, train."""
    accelerator = Accelerator(cpu=True)
    transformer = stand_ins.Flux2(checkpointing)
    if split:
        exec(LOADING, {"transformer": transformer, "dtype": torch.float32})
        assert find_split(transformer) is not None
    transformer.to("cpu", dtype=torch.float32)
    transformer.requires_grad_(False)
    network = network_of(transformer, torch.tensor([0.5]), edited=split)
    network.to("cpu", torch.float32)
    transformer, network = accelerator.prepare(transformer, network)
    optimizer = accelerator.prepare(torch.optim.AdamW(network.parameters(), 1e-2))
    transformer.to("cpu").train()
    losses = []
    for batch in stand_ins.batches(4):
        pred = transformer(
            x=batch["latents"] + batch["noise"], timesteps=torch.tensor([0.5]), ctx=batch["ctx"]
        )
        loss = (pred - (batch["noise"] - batch["latents"])).square().mean()
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach())
    return losses, [parameter.detach() for parameter in network.parameters()]


@pytest.mark.parametrize("checkpointing", ["", "outside"])
def test_losses_and_trained_lora_are_those_of_the_unsplit_trainer(checkpointing):
    theirs, their_lora = train(False, checkpointing)
    ours, lora = train(True, checkpointing)
    stand_ins.assert_same(ours, theirs)
    stand_ins.assert_same(lora, their_lora)


def loss_on_two_devices(mode: FakeTensorMode, *, edited: bool) -> Tensor:
    transformer = stand_ins.Flux2().requires_grad_(False)
    exec(LOADING, {"transformer": transformer, "dtype": torch.float32})
    division = find_split(transformer)
    with mode:
        multiplier = torch.empty(1, device=DEVICES[0])
    network_of(transformer, multiplier, edited=edited)
    object.__setattr__(division.placement, "devices", DEVICES)
    make_fake(transformer, division.placement.device_of, mode)
    for adapter, layer in adapters_of(transformer).items():
        make_fake(adapter, lambda _, layer=layer: division.placement.device_of(layer), mode)
    with mode:
        x, ctx = torch.empty(1, 5, 8, device=DEVICES[0]), torch.empty(1, 3, 8, device=DEVICES[0])
        return transformer(x=x, timesteps=torch.empty(1, device=DEVICES[0]), ctx=ctx).square().mean()


def test_without_the_edit_of_the_multiplier_two_devices_mix():
    with pytest.raises(RuntimeError, match=r"cpu:1.*cpu:2|cpu:2.*cpu:1"):
        loss_on_two_devices(FakeTensorMode(), edited=False)
    loss_on_two_devices(FakeTensorMode(), edited=True).backward()
