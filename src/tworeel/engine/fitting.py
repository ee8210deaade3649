"""Chooses what each block leaves behind by the memory that its device has: as much as fits.

One block of each kind of each stage is run once in each way, on the largest micro-batch, and what it keeps
and takes is measured. More kept blocks are less to compute again.
"""

from __future__ import annotations

import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge
from torch.utils._pytree import tree_leaves, tree_map_only

from tworeel.engine.footprints import TOO_LARGE, Footprint, StageFootprints
from tworeel.engine.placement import Placement
from tworeel.engine.releasing import release_memory
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


PARKED_ON_DEVICE = 5
"""Blocks whose parked activations are on the device all the same: three that leave (two may be queued behind
the one that runs), what the block that runs has fetched, and what the next one has."""
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
        memory.in_flight * found.left[memory.num_blocks - fit.num_kept]
        for memory, found, fit in zip(memories, footprints, fits, strict=True)
        if memory is not None and fit is not None and fit.fallback.is_parked
    )
    if host_limit is None or parked <= host_limit:
        return fits
    return [
        replace(fit, fallback=Residency.OFFLOAD) if fit is not None and fit.fallback.is_parked else fit
        for fit in fits
    ]


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
    # The blocks that keep all are the last: their backwards are through when the first of the others begins.
    working = max(footprints.keeping[others], footprints.working[others] - kept)
    # Inputs are sent ahead of their turn; gradients wait for theirs, all but the one that a block works with.
    waiting = (memory.in_flight - 1) * footprints.hidden
    crossing = memory.holding * (footprints.hidden + memory.inputs) + waiting
    return memory.in_flight * (kept + left) + crossing + once + working


def streamable(block: int, num_blocks: int, streamed: int = 0) -> int:
    """Bytes that streaming the rest of a stage's blocks would free; arguments as `blocks_to_stream`'s."""
    in_slots = 0 if streamed else SLOTS
    return max(0, num_blocks - streamed - in_slots) * block


def blocks_to_stream(missing: int, block: int, num_blocks: int, streamed: int = 0) -> int:
    """How many of a stage's blocks must be streamed to free so many bytes more.

    Args:
        missing: bytes that are too few.
        block: frozen weights of one block, in bytes.
        num_blocks: of the stage.
        streamed: blocks that are streamed already; the first ones also pay for the slots.
    """
    in_slots = 0 if streamed else SLOTS
    return min(num_blocks, streamed + in_slots + -(-missing // max(1, block)))


def available_memory(placement: Placement, model: nn.Module, stage: int) -> int:
    """Bytes that activations may take on a stage's device; stages that share it get equal parts.

    Room for gradients that are not there yet, and for two moments of an optimizer, is set aside.
    """
    device = placement.devices[stage]
    total, free = total_and_free(device)
    coming = sum(
        p.nbytes * ((p.grad is None) + 2)
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


Run = Callable[[Residency, tuple[Any, ...], dict[str, Any]], Any]
"""(residency, args, kwargs of a block) -> its output."""


class Probe:
    """Measures what a block of each kind takes on each stage, beside a forward without gradients.

    Args:
        memories: of each stage, as far as it is known; None for those that are not measured.
    """

    def __init__(self, memories: Sequence[StageMemory | None]) -> None:
        self.memories = list(memories)
        """With the bytes of a micro-batch's inputs."""
        self.footprints: list[dict[str, dict[Residency, Footprint]]] = [{} for _ in memories]
        """Of each stage, by the kind of block."""

    def measure(
        self,
        stage: int,
        kind: str,
        device: torch.device,
        block: nn.Module,
        run: Run,
        args: Any,
        kwargs: Any,
        outputs: Any,
    ) -> None:
        """Run the block forward and backward in each way that is asked for.

        Args:
            stage, kind, device: of the block; each kind is measured once a stage.
            block: the block.
            run: runs it.
            args, kwargs: of its forward.
            outputs: what it returned for them.
        """
        memory = self.memories[stage]
        if memory is None or kind in self.footprints[stage]:
            return
        found = self.footprints[stage][kind] = {}
        inputs = max(memory.inputs, shared_bytes((args, kwargs), outputs))
        memory = self.memories[stage] = replace(memory, inputs=inputs)
        args, kwargs = as_in_training((args, kwargs), outputs)
        trained = [parameter for parameter in block.parameters() if parameter.requires_grad]
        for residency in (Residency.KEEP, Residency.SELECTIVE):
            if residency is Residency.KEEP or needs_fallback(memory, found[Residency.KEEP]):
                measure = partial(_footprint, residency, device, run, args, kwargs, trained)
                found[residency] = _after_warm_up(measure)


def as_in_training(inputs: Any, outputs: Any) -> Any:
    """A block's inputs anew: what comes out of a block goes into the next, and will need a gradient."""
    shapes = _shapes(outputs)

    def fresh(tensor: Tensor) -> Tensor:
        copy = tensor.detach()
        return copy.requires_grad_() if tensor.shape in shapes and tensor.is_floating_point() else copy

    return tree_map_only(Tensor, fresh, inputs)


def shared_bytes(inputs: Any, outputs: Any) -> int:
    """Bytes of what all blocks are given alike: of a block's inputs, those that no output looks like."""
    shapes = _shapes(outputs)
    tensors = [leaf for leaf in tree_leaves(inputs) if isinstance(leaf, Tensor)]
    return sum(tensor.nbytes for tensor in tensors if tensor.shape not in shapes)


def _shapes(outputs: Any) -> set[torch.Size]:
    return {leaf.shape for leaf in tree_leaves(outputs) if isinstance(leaf, Tensor)}


def _after_warm_up(measure: Callable[[], Footprint]) -> Footprint:
    """What the second run finds, since the first compiles; more than any device has if that does not fit."""
    try:
        with torch.enable_grad():
            measure()
            return measure()
    except torch.OutOfMemoryError as error:
        traceback.clear_frames(error.__traceback__)
    release_memory()
    return TOO_LARGE


def _footprint(
    residency: Residency,
    device: torch.device,
    run: Run,
    args: Any,
    kwargs: Any,
    trained: Sequence[nn.Parameter],
) -> Footprint:
    torch.accelerator.synchronize(device)
    before = torch.accelerator.memory_allocated(device)
    torch.accelerator.reset_peak_memory_stats(device)
    ran = Forward(partial(run, residency), [own_copies((args, kwargs))])
    kept = torch.accelerator.memory_allocated(device) - before
    ran.backward((args, kwargs), trained)
    peak = torch.accelerator.max_memory_allocated(device) - before
    return Footprint(kept=kept, working=peak - kept, hidden=ran.hidden)


def own_copies(inputs: Any) -> Any:
    """A block's inputs, of which those that need a gradient lie where nothing else holds them."""
    return tree_map_only(Tensor, lambda leaf: leaf.clone() if leaf.requires_grad else leaf, inputs)


class Forward:
    """A block's forward of which nothing is left but what it saved for its backward.

    Its input and its output may be among that, or not: what the block before, or the next one, keeps of them
    is counted there.

    Args:
        run: the block.
        inputs: (args, kwargs) in a list, which gives them up.

    Attributes:
        hidden: bytes that it gave.
    """

    def __init__(self, run: Callable[[Any, Any], Any], inputs: list[Any]) -> None:
        outputs = [leaf for leaf in tree_leaves(run(*inputs.pop())) if isinstance(leaf, Tensor)]
        self.hidden = sum(output.nbytes for output in outputs)
        outputs = [output for output in outputs if output.requires_grad]
        self._edges = [get_gradient_edge(output) for output in outputs]
        self._like = [partial(torch.ones, o.shape, dtype=o.dtype, device=o.device) for o in outputs]

    def backward(self, inputs: Any, trained: Sequence[nn.Parameter]) -> None:
        """Compute the gradients of the inputs that were copied and of the parameters.

        Not as a `backward()`, which would add to the parameters' gradients.
        """
        wanted = [leaf for leaf in tree_leaves(inputs) if isinstance(leaf, Tensor) and leaf.requires_grad]
        gradients = [ones() for ones in self._like]
        torch.autograd.grad(self._edges, [*wanted, *trained], gradients, allow_unused=True)
