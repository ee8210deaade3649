"""Which module lives on which stage: decided by names and sizes, before anything is moved or loaded."""

from __future__ import annotations

import bisect
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

import torch
from torch import nn


@dataclass(frozen=True)
class Unit:
    """A module that runs whole on one stage: a block, or something before, between or after the blocks."""

    name: str
    stage: int
    is_block: bool
    beside: str | None = None
    """The block that it lives with and whose residency it shares, if it was put there."""

    @property
    def kind(self) -> str:
        """The list that it is in, whose modules are alike; of what is in none, its name."""
        return self.name.rpartition(".")[0] or self.name


@dataclass(frozen=True)
class Placement:
    """Stages, their devices and the units that each of them runs, in the order of the forward."""

    devices: tuple[torch.device, ...]
    boundaries: tuple[int, ...]
    """First block of each stage, and the number of blocks at the end: P + 1 numbers."""
    units: tuple[Unit, ...]

    @property
    def num_stages(self) -> int:
        return len(self.devices)

    @property
    def block_names(self) -> list[str]:
        """Names of all blocks, in the order of the forward."""
        return [unit.name for unit in self.units if unit.is_block]

    @property
    def block_kinds(self) -> list[str]:
        """The kind of each block, in the order of the forward."""
        return [unit.kind for unit in self.units if unit.is_block]

    def blocks_of(self, stage: int) -> range:
        """Positions of the stage's blocks, counted over all block lists."""
        return range(self.boundaries[stage], self.boundaries[stage + 1])

    def stage_of(self, name: str) -> int:
        """Stage of a parameter, buffer or module by its name; what no unit holds belongs to the first."""
        return next((u.stage for u in self.units if name == u.name or name.startswith(u.name + ".")), 0)

    def device_of(self, name: str) -> torch.device:
        """Device of a parameter, buffer or module by its name."""
        return self.devices[self.stage_of(name)]


def place(
    model: nn.Module,
    devices: Sequence[str | torch.device],
    *,
    at: Sequence[int] | None = None,
    blocks: Sequence[str] | None = None,
    first: Sequence[str] = (),
    beside: Mapping[str, str] | None = None,
) -> Placement:
    """Decide which stage runs which part of `model`. Nothing is moved; parameters may be on meta.

    Args:
        model: any module whose forward runs one or more lists of blocks, each block once and in order.
        devices: one device a stage; the same device may stand more than once.
        at: first block of each stage after the first, counted over all lists. Even shares of the blocks'
            bytes by default.
        blocks: dotted names of the block lists in the order of the forward. Found by themselves by default:
            every `nn.ModuleList` of at least two modules of one class that is not inside of a block.
        first: dotted names of modules that run before the blocks although the model lists them behind.
        beside: names of modules that run between the blocks, each with the block that it has to live with.

    Raises:
        ValueError: no block lists, a name in `first` that is no module around the blocks, more stages than
            blocks, or boundaries out of order; all problems of one kind in one message.
    """
    lists = tuple(blocks) if blocks is not None else tuple(find_block_lists(model))
    beside = dict(beside or {})
    block_names = _block_names(model, lists)
    _check_beside(model, block_names, beside)
    boundaries = _boundaries(model, block_names, len(devices), at, beside)
    stage_of_block = {n: bisect.bisect_right(boundaries, i) - 1 for i, n in enumerate(block_names)}
    units = tuple(_units(model, lists, stage_of_block, beside, first))
    around = {unit.name for unit in units if not unit.is_block and unit.beside is None}
    if unknown := set(first) - around:
        named, known = ", ".join(sorted(unknown)), ", ".join(sorted(around)) or "none"
        raise ValueError(f"first={list(first)}: no module around the blocks is named {named}; known: {known}")
    return Placement(
        tuple(_with_index(torch.device(d)) for d in devices),
        boundaries,
        units,
    )


def find_block_lists(model: nn.Module) -> Iterator[str]:
    """Yield the names of the lists of at least two modules of one class, outermost first."""

    def visit(module: nn.Module, prefix: str) -> Iterator[str]:
        for name, child in module.named_children():
            path = f"{prefix}{name}"
            if isinstance(child, nn.ModuleList) and len(child) > 1 and len({type(m) for m in child}) == 1:
                yield path
            elif not isinstance(child, nn.ModuleList):
                yield from visit(child, f"{path}.")

    yield from visit(model, "")


def _with_index(device: torch.device) -> torch.device:
    """`cuda` is the first GPU; torch takes `cuda` and `cuda:0` for different devices."""
    return torch.device(device.type, 0) if device.type != "cpu" and device.index is None else device


def _block_names(model: nn.Module, lists: tuple[str, ...]) -> list[str]:
    if not lists:
        raise ValueError(f"{type(model).__name__} has no list of blocks: name them with blocks=[...]")
    modules = dict(model.named_modules())
    unknown = [n for n in lists if not isinstance(modules.get(n), nn.ModuleList | nn.Sequential)]
    if unknown:
        raise ValueError(f"{type(model).__name__} has no list of blocks named {', '.join(unknown)}")
    return [f"{name}.{i}" for name in lists for i in range(len(modules[name]))]


def _check_beside(model: nn.Module, blocks: list[str], beside: Mapping[str, str]) -> None:
    modules = dict(model.named_modules())
    wrong = [
        f"{name} beside {block}"
        for name, block in beside.items()
        if name not in modules or block not in blocks
    ]
    if wrong:
        raise ValueError(f"{type(model).__name__} has no such module or block: {', '.join(wrong)}")


def _boundaries(
    model: nn.Module, blocks: list[str], num_stages: int, at: Sequence[int] | None, beside: Mapping[str, str]
) -> tuple[int, ...]:
    if num_stages < 1:
        raise ValueError("at least one device is needed")
    if num_stages > len(blocks):
        raise ValueError(f"{num_stages} stages for {len(blocks)} blocks: at most one stage a block")
    inner = tuple(at) if at is not None else _even_shares(model, blocks, num_stages, beside)
    boundaries = (0, *inner, len(blocks))
    if len(inner) != num_stages - 1:
        raise ValueError(f"at={list(inner)}: {num_stages} stages need {num_stages - 1} boundaries")
    if any(a >= b for a, b in pairwise(boundaries)):
        raise ValueError(f"at={list(inner)}: boundaries must rise from 1 to {len(blocks) - 1}")
    return boundaries


def _even_shares(
    model: nn.Module, blocks: list[str], num_stages: int, beside: Mapping[str, str]
) -> tuple[int, ...]:
    """Cut where the running sum of the blocks' bytes is nearest to the stage's share; no stage is empty."""

    def size(name: str) -> int:
        return sum(p.nbytes for p in model.get_submodule(name).parameters())

    sizes = [size(n) + sum(size(other) for other, block in beside.items() if block == n) for n in blocks]
    running = [0, *accumulate(sizes)]
    cuts: list[int] = []
    for stage in range(1, num_stages):
        share = running[-1] * stage / num_stages
        first, last = (cuts[-1] if cuts else 0) + 1, len(blocks) - (num_stages - stage)
        cuts.append(min(range(first, last + 1), key=lambda i: abs(running[i] - share)))
    return tuple(cuts)


def _units(
    model: nn.Module,
    lists: tuple[str, ...],
    stage_of_block: dict[str, int],
    beside: Mapping[str, str],
    first: Sequence[str],
) -> Iterator[Unit]:
    """Walk the modules in the order of registration; what lies between blocks follows the last block."""
    opened = (*lists, *beside)
    stage = 0

    def visit(module: nn.Module, prefix: str) -> Iterator[Unit]:
        nonlocal stage
        for name, child in module.named_children():
            path = f"{prefix}{name}"
            if path in stage_of_block:
                stage = stage_of_block[path]
                yield Unit(path, stage, True)
            elif path in beside:
                yield Unit(path, stage_of_block[beside[path]], False, beside[path])
            elif path in lists or any(n.startswith(f"{path}.") for n in opened):
                yield from visit(child, f"{path}.")
            else:
                yield Unit(path, 0 if path in first else stage, False)

    return visit(model, "")
