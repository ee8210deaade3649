"""Chooses what each block leaves behind by the memory that its device has: as much as fits.

More kept blocks are less to compute again.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import nn
from torch.optim import Optimizer

from tworeel.engine.footprints import Footprint, StageFootprints
from tworeel.engine.placement import Placement
from tworeel.engine.residency import Residency
from tworeel.engine.weight_streaming import SLOTS

SPARE = 0.04
"""Share of a device's memory that is left alone: the allocator's rounding and gaps."""


@dataclass(frozen=True)
class StageMemory:
    """What a stage has to divide."""

    available: int
    """Bytes on its device that are not taken by weights, gradients or optimizer state."""
    num_blocks: int
    may_keep: int
    """Blocks whose weights are on the device: only they can keep their activations."""
    in_flight: int
    """Micro-batches whose activations it holds at a time."""
    num_kinds: int = 1
    """Kinds of blocks among them."""
    holding: int = 1
    """Micro-batches whose inputs it holds at a time: they are sent ahead of their turn."""
    inputs: int = 0
    """Bytes of a micro-batch that all blocks are given: text, rotary tables, modulation."""
    last_streamed: int = -1
    """Place, among the stage's blocks, of the last one whose weights are streamed; -1 if none are."""
    streamable: int = 0
    """Bytes of weights that could go to host memory beside those that are there already."""


@dataclass(frozen=True)
class Fit:
    """What the blocks of a stage leave behind."""

    num_kept: int
    """Blocks that keep everything."""
    fallback: Residency
    """Of the others."""
    missing: int = 0
    """Bytes that are still too few."""


PARKED_ON_DEVICE = 2
"""Blocks whose parked activations are on the device all the same: in a forward those of the block that runs
and of the one before, in a backward those of the block that runs and of the one that comes next."""
FALLBACKS = (Residency.SELECTIVE, Residency.OFFLOAD_SELECTIVE)
"""For blocks whose activations cannot all stay, best first."""


def fit_stage(memory: StageMemory, footprints: StageFootprints) -> Fit:
    """Let as many blocks of a stage as possible keep everything.

    Weights are streamed before attentions are computed again: that costs no time where clips are long.

    Args:
        memory: of the stage.
        footprints: of its blocks.
    """
    for fallback in FALLBACKS:
        for num_kept in range(memory.may_keep, -1, -1):
            if needed(memory, footprints, num_kept, fallback) <= memory.available:
                return Fit(num_kept, fallback)
    missing = needed(memory, footprints, 0, FALLBACKS[-1]) - memory.available
    if missing <= memory.streamable:
        return Fit(0, FALLBACKS[-1], missing)
    least = needed(memory, footprints.inputs_only(), 0, Residency.OFFLOAD)
    return Fit(0, Residency.OFFLOAD, max(0, least - memory.available))


def fit_stages(
    memories: Sequence[StageMemory | None],
    footprints: Sequence[StageFootprints],
    host_limit: int | None,
) -> list[Fit | None]:
    """Fit each stage that has a memory; what is parked by all of them together has to fit the host, too.

    Where it does not, only the blocks' inputs are parked, and the attentions are computed again.
    """
    fits = [
        None if memory is None else fit_stage(memory, found)
        for memory, found in zip(memories, footprints, strict=True)
    ]
    parked = sum(
        memory.in_flight * _parked(found, fit)[memory.num_blocks - fit.num_kept]
        for memory, found, fit in zip(memories, footprints, fits, strict=True)
        if memory is not None and fit is not None and fit.fallback.is_parked
    )
    if host_limit is None or parked <= host_limit:
        return fits
    return [
        replace(fit, fallback=Residency.OFFLOAD) if fit is not None and fit.fallback.is_parked else fit
        for fit in fits
    ]


def _parked(footprints: StageFootprints, fit: Fit) -> list[int]:
    """Bytes that the first blocks of a stage park for a micro-batch, by their number."""
    return (footprints.inputs_only() if fit.fallback is Residency.OFFLOAD else footprints).left


def needs_fallback(memory: StageMemory, keep: Footprint) -> bool:
    """Whether not all blocks of a stage, this one's like, can keep their activations."""
    if memory.may_keep < memory.num_blocks or memory.num_kinds > 1:
        return True
    everything = StageFootprints([{Residency.KEEP: keep}] * memory.num_blocks)
    return needed(memory, everything, memory.num_blocks, FALLBACKS[0]) > memory.available


def needed(memory: StageMemory, footprints: StageFootprints, num_kept: int, fallback: Residency) -> int:
    """Bytes that the activations of a stage take at their peak.

    Args:
        memory: of the stage.
        footprints: of its blocks.
        num_kept: blocks that keep everything.
        fallback: of the others.
    """
    others = memory.num_blocks - num_kept
    once, left = 0, footprints.left[others]
    if fallback.is_parked:
        once, left = PARKED_ON_DEVICE * footprints.most_left[others], 0
    kept = footprints.kept[others]
    # The blocks that keep all are the last, but for streamed ones: only those behind the last of these are
    # through with their backwards when the first of the others begins.
    behind = min(num_kept, memory.num_blocks - 1 - memory.last_streamed)
    through = footprints.kept[memory.num_blocks - behind]
    working = max(footprints.keeping[others], footprints.working[others] - through)
    # Inputs are sent ahead of their turn; gradients wait for theirs, all but the one that a block works with.
    waiting = (memory.in_flight - 1) * footprints.hidden
    crossing = memory.holding * (footprints.hidden + memory.inputs) + waiting
    return memory.in_flight * (kept + left) + crossing + once + working


def streamable(block: int, num_blocks: int, streamed: int = 0, *, slot: int | None = None) -> int:
    """Bytes that streaming the rest of a stage's blocks would free; arguments as `blocks_to_stream`'s."""
    return max(0, (num_blocks - streamed) * block - _slots(streamed, slot or block))


def blocks_to_stream(
    missing: int, block: int, num_blocks: int, streamed: int = 0, *, slot: int | None = None
) -> int:
    """How many of a stage's blocks must be streamed to free so many bytes more.

    Args:
        missing: bytes that are too few.
        block: frozen weights of one block, in bytes; of the smallest, if they differ.
        num_blocks: of the stage.
        streamed: blocks that are streamed already; the first ones also pay for the slots.
        slot: frozen weights of the largest block, if they differ.
    """
    more = -(-(missing + _slots(streamed, slot or block)) // max(1, block))
    return min(num_blocks, streamed + more)


def _slots(streamed: int, slot: int) -> int:
    """Bytes that the slots still take on the device."""
    return 0 if streamed else SLOTS * slot


def available_memory(
    placement: Placement, model: nn.Module, stage: int, optimizer: Optimizer | None = None
) -> int:
    """Bytes that activations may take on a stage's device; stages that share it get equal parts.

    Room for gradients and for two moments of an optimizer is set aside, as far as they are not there yet.

    Args:
        placement: of the model.
        model: whose parameters are trained.
        stage: of the model.
        optimizer: what it has is there already; without, all moments are still to come.
    """
    device = placement.devices[stage]
    total, free = total_and_free(device)
    moments = {} if optimizer is None else optimizer.state
    coming = sum(
        p.nbytes * ((p.grad is None) + 2 * (not moments.get(p)))
        for name, p in model.named_parameters()
        if p.requires_grad and placement.device_of(name) == device
    )
    return int((free - coming - SPARE * total) / placement.devices.count(device))


def total_and_free(device: torch.device) -> tuple[int, int]:
    """Bytes that this process may use on a device, and those of them that no tensor takes."""
    free, total = torch.accelerator.get_memory_info(device)
    allocated = torch.accelerator.memory_allocated(device)
    free += torch.accelerator.memory_reserved(device) - allocated
    if device.type == "cuda":
        limit = int(torch.cuda.get_per_process_memory_fraction(device) * total)
        return limit, min(free, limit - allocated)
    return total, free
