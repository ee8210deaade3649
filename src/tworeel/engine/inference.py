"""Runs a split model forward only, beside a training that must not notice."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from tworeel.engine.split import Split


@contextmanager
def at_rest(split: Split) -> Iterator[None]:
    """Let the model be used for inference inside; afterwards it is as a training left it.

    Its blocks run as they are: a compilation for other shapes would count against those of the training.
    """
    training = {module: module.training for module in split.model.modules()}
    compiler, split.compiler = split.compiler, None
    try:
        split.model.eval()
        yield
    finally:
        split.rest()
        split.compiler = compiler
        for module, mode in training.items():
            module.training = mode


@contextmanager
def random_state_kept(devices: Sequence[torch.device]) -> Iterator[None]:
    """Let nothing that is drawn inside, on the CPU or on these devices, be missed outside."""
    accelerators = {device for device in devices if device.type != "cpu"}
    kind = next(iter(accelerators)).type if accelerators else "cuda"
    with torch.random.fork_rng(sorted(device.index for device in accelerators), device_type=kind):
        yield


@torch.no_grad()
def infer(split: Split, *args: Any, **kwargs: Any) -> Any:
    """Run the model's forward without gradients; what it returns is on the first stage's device."""
    devices = split.placement.devices
    split.place_adapters()
    with _current_device(devices[0]), split.passage(_Follow(devices)):
        output = split.model(*args, **kwargs)
        return tree_map_only(Tensor, lambda tensor: tensor.to(devices[0]), output)


class _Follow:
    """A gate that lets each stage's device be the current one: some kernels ask for it."""

    def __init__(self, devices: Sequence[torch.device]) -> None:
        self._devices = devices

    def advance(self, stage: int, to: int) -> None:
        _make_current(self._devices[to])


@contextmanager
def _current_device(device: torch.device) -> Iterator[None]:
    before = torch.accelerator.current_device_index() if torch.accelerator.is_available() else None
    _make_current(device)
    try:
        yield
    finally:
        if before is not None:
            torch.accelerator.set_device_index(before)


def _make_current(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.set_device_index(device)
