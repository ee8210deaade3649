"""Where each tensor of a split model lives, and its way there."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from tworeel.engine.placement import Placement
from tworeel.engine.weight_streaming import frozen_parameters


def move(model: nn.Module, placement: Placement, streamed: Sequence[int]) -> None:
    """Move every parameter and buffer to its stage's device, but for those that are streamed."""
    for tensor, device in lodgers(model, placement, streamed):
        tensor.data = tensor.data.to(device)


def lodgers(
    model: nn.Module, placement: Placement, streamed: Sequence[int]
) -> Iterator[tuple[Tensor, torch.device]]:
    """Parameters and buffers with the devices that they live on; those that are streamed live on none."""
    waiting = {
        id(parameter)
        for i in streamed
        for parameter in frozen_parameters(model.get_submodule(placement.block_names[i]))
    }
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if id(tensor) not in waiting:
            yield tensor, placement.device_of(name)
