"""Frozen weights that wait in pinned host memory and are brought to their device ahead of use.

A stage has two slots on its device, each as large as its largest streamed block. While a block computes from
one slot, the next one's weights are copied into the other. They never go back: they are frozen.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache

import torch
from torch import Tensor, nn

from tworeel.engine.host_pool import pinned_size
from tworeel.engine.streams import HOST, mark, side_stream, using

ALIGNMENT = 256
"""Of each tensor in a slot, in bytes: what kernels for matrices ask for."""
SLOTS = 2
_LARGEST_SLAB = 4
"""Blocks, before it is rounded up: while weights are copied to a slab, the rest of it is there twice."""


@dataclass
class _Slot:
    """Device memory for one block's weights."""

    memory: Tensor
    block: int | None = None
    arrived: torch.Event | None = None
    last_use: torch.Event | None = None


@dataclass
class HostWeights:
    """One block's frozen parameters, and the one copy of their values."""

    host: Tensor
    places: list[tuple[nn.Parameter, int]] = field(default_factory=list)
    """Each parameter with its offset in bytes."""

    def point_to(self, memory: Tensor) -> None:
        """Let the parameters be views of `memory`."""
        for parameter, offset in self.places:
            flat = memory[offset : offset + parameter.nbytes]
            parameter.data = flat.view(parameter.dtype).view(parameter.shape)


class WeightStreamer:
    """Brings the weights of one stage's streamed blocks to its device, one block ahead.

    Its methods are called in the order of the stage's work, by one thread at a time.

    Args:
        device: of the stage.
        blocks: the stage's streamed blocks by their position; their frozen parameters may be on any device
            and end in host memory.
    """

    def __init__(self, device: torch.device, blocks: Mapping[int, nn.Module]) -> None:
        self.device = device
        self.host_bytes = 0
        """Bytes of host memory that the weights take, with what rounding loses."""
        self._blocks: dict[int, HostWeights] = {}
        self._slots: list[_Slot] = []
        self._current: _Slot | None = None
        self.add(blocks)

    def add(self, blocks: Mapping[int, nn.Module]) -> None:
        """Between two steps: let the weights of more blocks be streamed."""
        self.host_bytes += host_bytes(map(streamed_size, blocks.values()), self.device)
        self._blocks |= to_host(blocks, self.device)
        self._order = sorted(self._blocks)
        self._slots.clear()  # before there are others
        size = max((b.host.nbytes for b in self._blocks.values()), default=0)
        self._slots += [_new_slot(size, self.device) for _ in range(min(SLOTS, len(self._blocks)))]

    def use(self, position: int, *, backward: bool) -> None:
        """The block at `position` is about to run: its weights are there for what is queued from now on."""
        self._release()
        if position not in self._blocks:
            return
        slot = self._bring(position)
        if slot.arrived is not None:
            torch.accelerator.current_stream(self.device).wait_event(slot.arrived)
        self._blocks[position].point_to(slot.memory)
        self._current = slot
        self._bring_next(position, -1 if backward else 1)

    def expect(self, *, backward: bool) -> None:
        """The stage's next work is a backward (from its last block) or a forward (from its first)."""
        self._release()
        if self._order:
            self._bring(self._order[-1 if backward else 0])

    def rest(self) -> None:
        """Between two steps: the parameters are what is in host memory, also where that is changed now."""
        self._release()
        for slot in self._slots:
            slot.block = None
        for block in self._blocks.values():
            block.point_to(block.host)

    def _release(self) -> None:
        """Everything that uses the current slot is queued."""
        if self._current is not None and self.device.type != "cpu":
            self._current.last_use = mark(self.device)
        self._current = None

    def _bring_next(self, position: int, step: int) -> None:
        following = self._order.index(position) + step
        if 0 <= following < len(self._order):
            self._bring(self._order[following])

    def _bring(self, position: int) -> _Slot:
        """The slot that holds a block's weights, or will: the copy is begun."""
        for slot in self._slots:
            if slot.block == position:
                return slot
        slot = next(slot for slot in self._slots if slot is not self._current)
        host = self._blocks[position].host
        if self.device.type == "cpu":
            slot.memory[: host.nbytes].copy_(host)
        else:
            arriving = side_stream(self.device, "in", HOST)
            if slot.last_use is not None:
                arriving.wait_event(slot.last_use)
            with using(arriving):
                slot.memory[: host.nbytes].copy_(host, non_blocking=True)
            slot.arrived = arriving.record_event()
        slot.block = position
        # The other slot is the next to be overwritten.
        self._slots.sort(key=lambda other: other is slot)
        return slot


def _new_slot(size: int, device: torch.device) -> _Slot:
    memory = torch.empty(size, dtype=torch.uint8, device=device)
    if device.type == "cpu":
        return _Slot(memory)
    # A copy may still be under way when the slot is given up.
    memory.record_stream(side_stream(device, "in", HOST))
    # What had this memory before may still be at work.
    return _Slot(memory, last_use=mark(device))


def spread(positions: Sequence[int], count: int) -> list[int]:
    """Choose `count` of the positions, evenly: a copy has the time of the blocks between two of them."""
    return [positions[(2 * i + 1) * len(positions) // (2 * count)] for i in range(count)]


@dataclass(frozen=True)
class Streamed:
    """What it means for a stage that the weights of some more blocks are streamed; in bytes."""

    freed: int = 0
    """That its device gets back: less than nothing where the slots take more."""
    pinned: int = 0
    """Of host memory."""


def more_and_more_streamed(sizes: Sequence[int], streamed: int = 0, slot: int = 0) -> list[Streamed]:
    """What it means that 0, 1, … of a stage's blocks are streamed, spread evenly.

    Args:
        sizes: frozen weights of each block that is on the device, in bytes.
        streamed: blocks that are streamed already.
        slot: bytes of each of the slots that they have.
    """
    taken, found = min(SLOTS, streamed) * slot, []
    for more in range(len(sizes) + 1):
        chosen = spread(sizes, more)
        slots = min(SLOTS, streamed + more) * max((slot, *chosen))
        found.append(Streamed(sum(chosen) + taken - slots, pinned_bytes(chosen)))
    return found


def enough(missing: int, ways: Sequence[Streamed]) -> int:
    """How many more blocks must be streamed to free so many bytes; where none does, that which frees most."""
    counts = range(len(ways))
    return next(
        (more for more in counts if ways[more].freed >= missing),
        max(counts, key=lambda n: (ways[n].freed, n)),
    )


def frozen_parameters(block: nn.Module) -> Iterable[nn.Parameter]:
    """The parameters of a block that are not trained."""
    return (parameter for parameter in block.parameters() if not parameter.requires_grad)


def streamed_size(block: nn.Module) -> int:
    """Bytes that a block takes in host memory when its weights are streamed."""
    return _offsets(block)[0]


def host_bytes(sizes: Iterable[int], device: torch.device) -> int:
    """What the streamed weights of one stage take of host memory: pinned for a device that is not the CPU.

    Args:
        sizes: of the blocks, in bytes.
        device: of the stage.
    """
    return sum(sizes) if device.type == "cpu" else pinned_bytes(sizes)


def pinned_bytes(sizes: Iterable[int]) -> int:
    """The pinned memory that the streamed blocks of one stage take: torch rounds up to powers of two.

    Args:
        sizes: of the blocks, in bytes.
    """
    counts = Counter(size for size in sizes if size)
    return sum(pinned_size(n * size) for size, count in counts.items() for n in _slabs(size, count))


@cache
def _slabs(size: int, count: int) -> tuple[int, ...]:
    """How many of `count` blocks of a size share an allocation each, so that rounding loses least."""
    most = pinned_size(_LARGEST_SLAB * size) // size
    best: list[tuple[int, ...]] = [()]
    for number in range(1, count + 1):
        ways = ((n, *best[number - n]) for n in range(1, min(number, most) + 1))
        best.append(min(ways, key=lambda slabs: sum(pinned_size(n * size) for n in slabs)))
    return best[count]


def to_host(blocks: Mapping[int, nn.Module], device: torch.device) -> dict[int, HostWeights]:
    """Copy the blocks' frozen parameters to host memory, pinned for a device that is not the CPU."""
    plans = {position: _offsets(block) for position, block in blocks.items()}
    counts = Counter(size for size, _ in plans.values())
    buffers = {size: _buffers(size, count, device) for size, count in counts.items()}
    return {position: _fill(next(buffers[size]), places) for position, (size, places) in plans.items()}


def _buffers(size: int, count: int, device: torch.device) -> Iterator[Tensor]:
    """Host memory for so many blocks of a size, allocated as it is needed."""
    pinned = device.type != "cpu" and size > 0
    for n in _slabs(size, count) if pinned else (1,) * count:
        yield from torch.empty(n * size, dtype=torch.uint8, pin_memory=pinned).view(n, size)


def _offsets(block: nn.Module) -> tuple[int, list[tuple[nn.Parameter, int]]]:
    """The bytes that a block's frozen parameters take together, and where in them each begins."""
    places: list[tuple[nn.Parameter, int]] = []
    size = 0
    for parameter in frozen_parameters(block):
        places.append((parameter, size))
        size += -(-parameter.nbytes // ALIGNMENT) * ALIGNMENT
    return size, places


def _fill(host: Tensor, places: list[tuple[nn.Parameter, int]]) -> HostWeights:
    for parameter, offset in places:
        flat = host[offset : offset + parameter.nbytes].view(parameter.dtype).view(parameter.shape)
        flat.copy_(parameter.data)
        # Now, not when all blocks are copied: no device or host holds two copies of more than one block.
        parameter.data = flat
    return HostWeights(host, places)
