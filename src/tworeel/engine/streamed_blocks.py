"""Which blocks of a split model have their weights streamed."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from tworeel.engine.placement import Placement
from tworeel.engine.residency import Residency
from tworeel.engine.weight_streaming import WeightStreamer, spread


class StreamedBlocks:
    """The blocks whose weights wait in host memory, and each stage's streamer; there may be none.

    Args:
        model: the split model.
        placement: of the model.
        positions: of the blocks that are streamed.
    """

    def __init__(self, model: nn.Module, placement: Placement, positions: Sequence[int]) -> None:
        self._model = model
        self._placement = placement
        self.positions = tuple(positions)
        self._streamers = [self._streamer_of(stage) for stage in range(placement.num_stages)]

    def __contains__(self, position: int) -> bool:
        return position in self.positions

    @property
    def host_bytes(self) -> int:
        """Bytes of pinned host memory that hold weights."""
        return sum(streamer.host_bytes for streamer in self._streamers)

    def on(self, stage: int) -> list[int]:
        """Positions of the stage's blocks that are streamed."""
        return [position for position in self._placement.blocks_of(stage) if position in self.positions]

    def stream(self, stage: int, count: int) -> None:
        """Let the weights of so many blocks of a stage wait in host memory from now on.

        Those that wait there already stay: nothing would bring them back.
        """
        here = [block for block in self._placement.blocks_of(stage) if block not in self.positions]
        more = count - len(self.on(stage))
        if more <= 0:
            return
        self.positions = tuple(sorted([*self.positions, *spread(here, more)]))
        self._streamers[stage] = self._streamer_of(stage)

    def use(self, stage: int, position: int, *, backward: bool) -> None:
        """The stage's block at `position` is about to run."""
        self._streamers[stage].use(position, backward=backward)

    def expect(self, stage: int, *, backward: bool) -> None:
        """The stage's next work begins at its last block (a backward) or at its first."""
        self._streamers[stage].expect(backward=backward)

    def rest(self) -> None:
        """Let the parameters be what is in host memory, until a block uses them again."""
        for streamer in self._streamers:
            streamer.rest()

    def _streamer_of(self, stage: int) -> WeightStreamer:
        """That of one stage; without streamed blocks it does nothing."""
        names = self._placement.block_names
        blocks = {position: self._model.get_submodule(names[position]) for position in self.on(stage)}
        return WeightStreamer(self._placement.devices[stage], blocks)


def streamed_positions(placement: Placement, counts: Sequence[int] | None) -> list[int]:
    """Positions of the blocks whose weights are streamed, spread evenly over each stage.

    Raises:
        ValueError: not one count a stage, or more than the stage has blocks.
    """
    if counts is None:
        return []
    stages = [placement.blocks_of(stage) for stage in range(placement.num_stages)]
    if len(counts) != len(stages):
        raise ValueError(f"streamed={list(counts)}: {len(stages)} stages need as many numbers")
    for stage, (blocks, count) in enumerate(zip(stages, counts, strict=True)):
        if not 0 <= count <= len(blocks):
            raise ValueError(f"streamed={list(counts)}: stage {stage} has {len(blocks)} blocks")
    return [i for blocks, count in zip(stages, counts, strict=True) for i in spread(blocks, count)]


def refuse_kept_streamed(residencies: Sequence[Residency], streamed: Sequence[int]) -> None:
    """Raise ValueError if a block whose weights are streamed keeps its activations."""
    for position in streamed:
        if not residencies[position].recomputes:
            raise ValueError(f"block {position}: its weights are streamed, so its residency cannot be 'keep'")
