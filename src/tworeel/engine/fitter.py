"""Lets the blocks of a split model keep as much as its devices have room for."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

import torch

from tworeel.engine.fitting import (
    Fit,
    StageMemory,
    available_memory,
    fit_stages,
)
from tworeel.engine.footprints import TOO_LARGE, Footprints, StageFootprints, together
from tworeel.engine.probing import Probe
from tworeel.engine.releasing import clear_frames, release_memory
from tworeel.engine.residency import Residency
from tworeel.engine.schedule import Held, most_held
from tworeel.engine.split import Split
from tworeel.engine.weight_streaming import frozen_parameters, more_and_more_streamed


def fit(split: Split, forward: Callable[[], Any], in_flight: Sequence[int]) -> None:
    """Choose the residencies of all blocks, and how many have their weights streamed if that is not enough.

    Stages on a CPU stay as they are.

    Args:
        split: the model.
        forward: runs it on the largest micro-batch.
        in_flight: micro-batches whose activations each stage holds at a time.

    Raises:
        torch.OutOfMemoryError: one block alone is too large for its device.
    """
    while True:
        memories = [_memory(split, stage, held) for stage, held in enumerate(most_held(in_flight))]
        probe = _measure(split, forward, memories)
        if not (short := _short_of_memory(split, probe)):
            break
        _stream_more(split, short)
    assert probe is not None
    split.footprints = probe.footprints
    footprints = [_of_stage(split, stage, probe) for stage in range(len(in_flight))]
    for stage, found in enumerate(fit_stages(probe.memories, footprints, split.host_room)):
        if found is not None:
            split.stream(stage, min(found.streamed, split.streamed.most(stage, split.host_room)))
            _keep_most(split, stage, found)


def _memory(split: Split, stage: int, held: Held) -> StageMemory | None:
    """What a stage has; None on a CPU."""
    if split.placement.devices[stage].type == "cpu":
        return None
    blocks, streamed = split.placement.blocks_of(stage), split.streamed_on(stage)
    sizes = {position: _frozen_bytes(split, position) for position in blocks}
    resident = [size for position, size in sizes.items() if position not in streamed]
    slot = max((sizes[position] for position in streamed), default=0)
    return StageMemory(
        available=available_memory(split.placement, split.model, stage, split.optimizer),
        num_blocks=len(blocks),
        may_keep=len(blocks) - len(streamed),
        held=held,
        last_streamed=blocks.index(streamed[-1]) if streamed else -1,
        num_kinds=len({split.placement.block_kinds[position] for position in blocks}),
        streamed=len(streamed),
        streaming=more_and_more_streamed(resident if split.may_stream else (), len(streamed), slot),
    )


def _measure(
    split: Split,
    forward: Callable[[], Any],
    memories: Sequence[StageMemory | None],
) -> Probe | None:
    """What was found of each stage; None if the forward alone does not fit and weights may still go."""
    probe = Probe(memories)
    try:
        with split.probing(probe):
            outputs = forward()
            probe.end_head(split.placement.num_stages - 1, split.placement.devices[-1], outputs)
    except torch.OutOfMemoryError as error:
        if not _can_stream(split, _accelerated(split)):
            raise
        clear_frames(error)
        return None
    return probe


def _short_of_memory(split: Split, probe: Probe | None) -> list[int]:
    """Stages on which not even one block fits as long as so many weights are there; all without a probe."""
    if probe is None:
        return _accelerated(split)
    kinds = {stage: probe.footprints[stage].values() for stage in _accelerated(split)}
    return [
        stage
        for stage, found in kinds.items()
        if _can_stream(split, [stage]) and any(one.get(Residency.SELECTIVE) == TOO_LARGE for one in found)
    ]


def _of_stage(split: Split, stage: int, probe: Probe) -> StageFootprints:
    """What the blocks of a stage take, if it was measured."""
    if probe.memories[stage] is None:
        return StageFootprints([])
    measured, names = probe.footprints[stage], split.placement.block_names
    found: dict[str, list[Footprints]] = defaultdict(list)
    for unit in split.placement.units:
        if (unit.is_block or unit.beside is not None) and unit.kind in measured:
            found[unit.beside or unit.name].append(measured[unit.kind])
    return StageFootprints([together(found[names[position]]) for position in _by_need(split, stage)])


def _by_need(split: Split, stage: int) -> list[int]:
    """The stage's blocks in the order in which they stop to keep everything.

    Streamed blocks never keep. The last blocks come first in the backward: there nothing has to be fetched.
    """
    streamed = split.streamed_on(stage)
    others = [position for position in split.placement.blocks_of(stage) if position not in streamed]
    return [*streamed, *others]


def _accelerated(split: Split) -> list[int]:
    return [stage for stage, device in enumerate(split.placement.devices) if device.type != "cpu"]


def _can_stream(split: Split, stages: Sequence[int]) -> bool:
    """Whether stages have weights that could still go to host memory."""
    return split.may_stream and any(
        len(split.streamed_on(stage)) < split.streamed.most(stage, split.host_room) for stage in stages
    )


def _stream_more(split: Split, stages: Sequence[int]) -> None:
    """Stream half of the blocks of stages whose weights are still on their devices."""
    for stage in stages:
        streamed, blocks = len(split.streamed_on(stage)), len(split.placement.blocks_of(stage))
        half = streamed + -(-(blocks - streamed) // 2)
        split.stream(stage, min(half, split.streamed.most(stage, split.host_room)))
    release_memory()


def _frozen_bytes(split: Split, position: int) -> int:
    """Bytes of a block's frozen weights."""
    module = split.model.get_submodule(split.placement.block_names[position])
    return sum(parameter.nbytes for parameter in frozen_parameters(module))


def _keep_most(split: Split, stage: int, fit: Fit) -> None:
    blocks = _by_need(split, stage)
    for position in blocks:
        split.residencies[position] = fit.fallback
    may_keep = len(blocks) - len(split.streamed_on(stage))
    for position in blocks[len(blocks) - min(fit.num_kept, may_keep) :]:
        split.residencies[position] = Residency.KEEP
