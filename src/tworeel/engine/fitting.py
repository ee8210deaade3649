"""Chooses what each block leaves behind by the memory that its device has: as much as fits.

More kept blocks are less to compute again.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import nn
from torch.optim import Optimizer

from tworeel.engine.footprints import Footprint, StageFootprints
from tworeel.engine.host_pool import pool_bytes
from tworeel.engine.placement import Placement
from tworeel.engine.residency import Residency
from tworeel.engine.schedule import Held
from tworeel.engine.weight_streaming import Streamed, enough

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
    held: Held
    """Of micro-batches, at a time."""
    num_kinds: int = 1
    """Kinds of blocks among them."""
    inputs: int = 0
    """Bytes of a micro-batch that all blocks are given: text, rotary tables, modulation."""
    last_streamed: int = -1
    """Place, among the stage's blocks, of the last one whose weights are streamed; -1 if none are."""
    streamed: int = 0
    """Blocks whose weights are streamed already."""
    streaming: Sequence[Streamed] = (Streamed(),)
    """What it means that those of 0, 1, … more are; of none where no more may be."""
    head: int = 0
    """Bytes that the model takes behind its last block, on the stage that has that."""


@dataclass(frozen=True)
class Fit:
    """What the blocks of a stage leave behind, and how many have their weights streamed."""

    num_kept: int
    """Blocks that keep everything."""
    fallback: Residency
    """Of the others."""
    streamed: int = 0
    """Blocks whose weights are streamed."""
    missing: int = 0
    """Bytes on the device that are too few even so."""
    host: int = field(default=0, compare=False)
    """Bytes of host memory: what is parked, and weights that are there only then."""


PARKED_ON_DEVICE = 2
"""Blocks whose parked activations are on the device all the same: in a forward those of the block that runs
and of the one before, in a backward those of the block that runs and of the one that comes next."""
FALLBACKS = (Residency.OFFLOAD_SELECTIVE, Residency.SELECTIVE, Residency.OFFLOAD, Residency.RECOMPUTE)
"""For blocks that cannot keep everything where `SELECTIVE` alone does not make enough room; best first. A
parked byte makes more room than a streamed one: it is one of each micro-batch."""


def ways_to_fit(memory: StageMemory, footprints: StageFootprints) -> list[Fit]:
    """The ways in which a stage fits its device, best first: each takes less of the host than those before.

    Weights are streamed before attentions are computed again: that costs no time where clips are long.

    Args:
        memory: of the stage.
        footprints: of its blocks.

    Returns:
        At least one; where a stage fits in no way, the one that is nearest to it.
    """
    on_device = fit_as(Residency.SELECTIVE, memory, footprints)
    if not on_device.host and not on_device.missing:
        return [on_device]
    inputs_only = footprints.inputs_only()
    left = {fallback: footprints if fallback.is_selective else inputs_only for fallback in FALLBACKS}
    found = [fit_as(fallback, memory, left[fallback]) for fallback in FALLBACKS]
    leaner: list[Fit] = []
    for fit in found:
        if not fit.missing and (not leaner or fit.host < leaner[-1].host):
            leaner.append(fit)
    return leaner or [min(found, key=lambda fit: fit.missing)]


def fit_as(fallback: Residency, memory: StageMemory, footprints: StageFootprints) -> Fit:
    """Let as many blocks keep everything as fit, the others leave behind what `fallback` says.

    Where no block can, as many weights are streamed as are in the way.

    Args:
        fallback: of the others.
        memory: of the stage.
        footprints: of its blocks, when they do not keep everything as `fallback` says.
    """

    def fit(num_kept: int, more: int = 0, missing: int = 0) -> Fit:
        host = memory.streaming[more].pinned + parked_bytes(memory, footprints, num_kept, fallback)
        return Fit(num_kept, fallback, memory.streamed + more, missing, host=host)

    for num_kept in range(memory.may_keep, -1, -1):
        missing = needed(memory, footprints, num_kept, fallback) - memory.available
        if missing <= 0:
            return fit(num_kept)
    more = enough(missing, memory.streaming)
    return fit(0, more, max(0, missing - memory.streaming[more].freed))


def parked_bytes(memory: StageMemory, footprints: StageFootprints, num_kept: int, fallback: Residency) -> int:
    """Bytes of host memory that the activations of a stage take; arguments as `needed`'s."""
    if not fallback.is_parked:
        return 0
    parked = memory.held.in_flight * footprints.left[memory.num_blocks - num_kept]
    return pool_bytes(parked, footprints.hidden)


def fit_stages(
    memories: Sequence[StageMemory | None],
    footprints: Sequence[StageFootprints],
    host_limit: int | None,
) -> list[Fit | None]:
    """Fit each stage that has a memory; what they park and stream has to fit the host, too."""
    ways = {
        stage: ways_to_fit(memory, found)
        for stage, (memory, found) in enumerate(zip(memories, footprints, strict=True))
        if memory is not None
    }
    for fits in leaner_and_leaner(list(ways.values())):
        if host_limit is None or sum(fit.host for fit in fits) <= host_limit:
            break
    of_stage = dict(zip(ways, fits, strict=True))
    return [of_stage.get(stage) for stage in range(len(memories))]


def leaner_and_leaner(ways: Sequence[Sequence[Fit]]) -> Iterator[list[Fit]]:
    """What stages may do together: each its best, then step by step with less of the host.

    Args:
        ways: of each stage, as `ways_to_fit` gives them.
    """
    at = [0] * len(ways)

    def step(stage: int) -> tuple[int, int]:
        before, after = ways[stage][at[stage] : at[stage] + 2]
        return FALLBACKS.index(after.fallback), after.host - before.host

    while True:
        yield [known[number] for known, number in zip(ways, at, strict=True)]
        open_ = [stage for stage, known in enumerate(ways) if at[stage] + 1 < len(known)]
        if not open_:
            return
        # The mildest one; of several alike that which frees most.
        at[min(open_, key=step)] += 1


def needs_fallback(memory: StageMemory, keep: Footprint) -> bool:
    """Whether not all blocks of a stage, this one's like, can keep their activations."""
    if memory.may_keep < memory.num_blocks or memory.num_kinds > 1:
        return True
    everything = StageFootprints([{Residency.KEEP: keep}] * memory.num_blocks)
    return needed(memory, everything, memory.num_blocks, Residency.SELECTIVE) > memory.available


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
    working = max(footprints.keeping[others], footprints.working[others] - through, memory.head)
    held = memory.held
    crossing = held.waiting * footprints.hidden + held.given * memory.inputs
    return held.in_flight * (kept + left) + crossing + once + working


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
