"""What blocks take on their device, and the sums over the blocks of a stage."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate

from tworeel.engine.residency import Residency


@dataclass(frozen=True)
class Footprint:
    """What one block takes on its device, in bytes, for one micro-batch."""

    kept: int
    """Between its forward and its backward."""
    working: int
    """While its forward or backward runs, beyond what it keeps."""
    hidden: int = 0
    """What it gives to the next block."""


TOO_LARGE = Footprint(kept=2**62, working=2**62)

Footprints = Mapping[Residency, Footprint]
"""Of one block, of `KEEP` and, if not all blocks keep everything, of `SELECTIVE`."""


def together(blocks: Sequence[Footprints]) -> Footprints:
    """What a block takes with others that run beside it: one of them works at a time."""
    ways = [way for way in blocks[0] if all(way in found for found in blocks)]
    return {way: _sum([found[way] for found in blocks]) for way in ways}


def _sum(found: Sequence[Footprint]) -> Footprint:
    if TOO_LARGE in found:
        return TOO_LARGE
    return Footprint(
        kept=sum(one.kept for one in found),
        working=max(one.working for one in found),
        hidden=max(one.hidden for one in found),
    )


class StageFootprints:
    """What the blocks of a stage take, which may be of several kinds.

    Args:
        blocks: of each block, in the order in which they stop to keep everything: streamed blocks never keep,
            and the last ones, which come first in the backward, keep longest.

    Attributes, by the number n of blocks that do not keep everything:
        left: bytes that the first n leave behind.
        most_left: of the one of them that leaves most.
        working: of the one of them that works with most.
        kept, keeping: bytes that those behind them keep, and of the one that works with most.
        hidden: what the stage is given, or gives.
    """

    def __init__(self, blocks: Sequence[Footprints]) -> None:
        self._blocks = blocks
        keep = [found[Residency.KEEP] for found in blocks]
        other = [found.get(Residency.SELECTIVE, found[Residency.KEEP]) for found in blocks]
        self.left = [0, *accumulate(one.kept for one in other)]
        self.most_left = [0, *accumulate((one.kept for one in other), max)]
        self.working = [0, *accumulate((one.working for one in other), max)]
        self.kept = [*accumulate((one.kept for one in reversed(keep)), initial=0)][::-1]
        self.keeping = [*accumulate((one.working for one in reversed(keep)), max, initial=0)][::-1]
        self.hidden = max((one.hidden for one in other), default=0)

    def inputs_only(self) -> StageFootprints:
        """The same blocks, where those that do not keep everything leave behind their input alone."""
        return StageFootprints(
            [
                {Residency.SELECTIVE: _leaving_its_input(found), Residency.KEEP: found[Residency.KEEP]}
                for found in self._blocks
            ]
        )


def _leaving_its_input(block: Footprints) -> Footprint:
    """While it computes again it holds that and what it would have kept."""
    if (known := block.get(Residency.RECOMPUTE)) is not None:
        return known
    keep = block[Residency.KEEP]
    # One that keeps all may not hold its input; a selective one does.
    if keep != TOO_LARGE:
        most, like = keep.kept + keep.working + keep.hidden, keep
    else:
        like = block.get(Residency.SELECTIVE, keep)
        most = like.kept + like.working
    left = min(like.kept, like.hidden)
    return replace(like, kept=left, working=most - left)
