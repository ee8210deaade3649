"""How many blocks each device gets, unless the user says."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence

import torch
from torch import nn

from tworeel.diffsynth.layouts import Layout
from tworeel.engine.placement import Placement
from tworeel.planning.budgets import Budget
from tworeel.planning.devices import budgets_on
from tworeel.planning.shares import BlockWeights, share_out
from tworeel.units import GIB

TRAINING_ROOM = 10 * GIB
"""Of the first device that is not given to a text encoder. A clip of 480 x 832 x 49 leaves 8 GiB behind in a
stage of 20 blocks of a 14B model that offloads, or in one that computes again."""


def budgets(devices: Sequence[str]) -> tuple[Budget, ...] | None:
    """What the devices have free, and how fast they are; None where one is a CPU."""
    return budgets_on([torch.device(device) for device in devices])


def planned(
    together: nn.Module,
    even: Placement,
    layout: Layout,
    others: Iterable[nn.Module],
    known: Sequence[Budget],
) -> tuple[int, ...]:
    """Find the boundaries by the free memory and the speed of the devices.

    Args:
        together: what runs at each step, in the precision that it is kept in.
        even: of the same, in even shares.
        layout: of the same.
        others: modules that go to the first device besides, as text encoder and VAE do.
        known: the devices' memory and speed, one a stage.
    """
    beside: dict[str, list[str]] = {name: [] for name in even.block_names}
    for name, block in layout.beside.items():
        beside[block].append(name)
    blocks = [
        _weights([together.get_submodule(name) for name in (block, *names)])
        for block, names in beside.items()
    ]
    around = [unit for unit in even.units if not unit.is_block and unit.beside is None]
    before = [together.get_submodule(unit.name) for unit in around if unit.stage == 0]
    after = [together.get_submodule(unit.name) for unit in around if unit.stage > 0]
    return share_out(blocks, known, first=sum(map(_size, (*before, *others))), last=sum(map(_size, after)))


def crowds_out(
    texts: Iterable[nn.Module],
    together: nn.Module,
    shares: Placement,
    others: Iterable[nn.Module],
    first: Budget,
) -> bool:
    """Whether text encoders would leave too little room for training on the first device.

    Args:
        texts: the text encoders.
        together: what runs at each step.
        shares: of the same, as far as they are known.
        others: modules that go to the first device besides.
        first: that device's memory.
    """
    own = [together.get_submodule(unit.name) for unit in shares.units if unit.stage == 0]
    return sum(map(_size, (*own, *others, *texts))) + TRAINING_ROOM > first.free


def _weights(modules: Sequence[nn.Module]) -> BlockWeights:
    products: Counter[torch.dtype] = Counter()
    for parameter in (p for module in modules for p in module.parameters() if p.dim() > 1):
        products[parameter.dtype] += parameter.numel()
    return BlockWeights(sum(map(_size, modules)), dict(products))


def _size(module: nn.Module) -> int:
    return sum(tensor.nbytes for tensor in (*module.parameters(), *module.buffers()))
