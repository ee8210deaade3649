"""Which blocks of a split model have their weights streamed."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from tworeel.engine.host_pool import GIB
from tworeel.engine.placement import Placement
from tworeel.engine.residency import Residency
from tworeel.engine.weight_streaming import WeightStreamer, host_bytes, spread, streamed_size


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
        # That of a stage without streamed blocks does nothing.
        self._streamers = [
            WeightStreamer(device, self._modules(self.on(stage)))
            for stage, device in enumerate(placement.devices)
        ]

    def __contains__(self, position: int) -> bool:
        return position in self.positions

    @property
    def host_bytes(self) -> int:
        """Bytes of pinned host memory that hold weights, with what rounding loses."""
        return sum(streamer.host_bytes for streamer in self._streamers)

    def on(self, stage: int) -> list[int]:
        """Positions of the stage's blocks that are streamed."""
        return [position for position in self._placement.blocks_of(stage) if position in self.positions]

    def stream(self, stage: int, count: int) -> None:
        """Let the weights of so many blocks of a stage wait in host memory from now on.

        Those that wait there already stay: nothing would bring them back.
        """
        more = count - len(self.on(stage))
        if more <= 0:
            return
        added = spread(self._resident(stage), more)
        self._streamers[stage].add(self._modules(added))
        self.positions = tuple(sorted([*self.positions, *added]))

    def most(self, stage: int, room: int | None) -> int:
        """The most blocks of a stage that can be streamed, those that are streamed already among them.

        Args:
            stage: of the model.
            room: bytes of host memory that more of them may take; None for no limit.
        """
        here, device = self._resident(stage), self._placement.devices[stage]
        for more in range(len(here), 0, -1):
            sizes = map(streamed_size, self._modules(spread(here, more)).values())
            if room is None or host_bytes(sizes, device) <= room:
                return len(self.on(stage)) + more
        return len(self.on(stage))

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

    def _resident(self, stage: int) -> list[int]:
        """Positions of the stage's blocks whose weights are on its device."""
        return [block for block in self._placement.blocks_of(stage) if block not in self.positions]

    def _modules(self, positions: Sequence[int]) -> dict[int, nn.Module]:
        return _blocks_at(self._model, self._placement, positions)


def _blocks_at(model: nn.Module, placement: Placement, positions: Sequence[int]) -> dict[int, nn.Module]:
    return {position: model.get_submodule(placement.block_names[position]) for position in positions}


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


def refuse_too_much_streamed(
    model: nn.Module, placement: Placement, streamed: Sequence[int], limit: int | None
) -> None:
    """Raise ValueError if streamed weights take more host memory than there may be.

    Args:
        model: that is split.
        placement: of the model.
        streamed: positions of the blocks whose weights are streamed.
        limit: bytes of host memory; None for no limit.
    """
    needed = 0
    for stage, device in enumerate(placement.devices):
        here = [position for position in placement.blocks_of(stage) if position in streamed]
        needed += host_bytes(map(streamed_size, _blocks_at(model, placement, here).values()), device)
    if limit is not None and needed > limit:
        raise ValueError(
            f"streamed={_counts(placement, streamed)}: these blocks' weights take {needed / GIB:.1f} GiB of "
            f"host memory, and {limit / GIB:.1f} GiB may be taken"
        )


def _counts(placement: Placement, streamed: Sequence[int]) -> list[int]:
    """How many blocks of each stage are streamed."""
    stages = map(placement.blocks_of, range(placement.num_stages))
    return [sum(position in streamed for position in blocks) for blocks in stages]
