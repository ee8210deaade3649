"""Which clip is trained on when, and everything random about it: pure functions of the seed and the step.

Nothing here has state, so a resumed run needs none: it goes on with the next step, on any devices.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch

from tworeel.data.clips import Clip


def generator_for(*parts: object) -> torch.Generator:
    """A CPU generator that is seeded by all of `parts`, for example (seed, step, micro-batch, "noise")."""
    digest = hashlib.sha256("/".join(map(str, parts)).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)


@dataclass(frozen=True)
class SourceShare:
    """The clips of one dataset, and how many of them an epoch draws."""

    clips: tuple[int, ...]
    per_epoch: int


class Order:
    """Shuffles the clips anew each epoch; a dataset counts by its weight and repeats.

    Args:
        clips: what the scan found.
        weights: weight times repeats of each dataset; a clip of a dataset with 2 comes twice an epoch, with
            0.5 every other epoch.
        seed: of the run.
    """

    def __init__(self, clips: Sequence[Clip], weights: Sequence[float], seed: int) -> None:
        assert clips, "no clips"
        self._seed = seed
        self._shares = []
        for source, weight in enumerate(weights):
            indices = tuple(i for i, clip in enumerate(clips) if clip.source == source)
            if indices:
                self._shares.append(SourceShare(indices, max(1, round(weight * len(indices)))))
        self.epoch_length = sum(share.per_epoch for share in self._shares)

    def clip_at(self, position: int) -> int:
        """Index of the clip at a position of the run: step × micro-batches a step + micro-batch."""
        epoch, offset = divmod(position, self.epoch_length)
        return self._epoch(epoch)[offset]

    @lru_cache(maxsize=2)  # noqa: B019  one order a run
    def _epoch(self, epoch: int) -> list[int]:
        drawn = [
            self._drawn(number, share, epoch * share.per_epoch + k)
            for number, share in enumerate(self._shares)
            for k in range(share.per_epoch)
        ]
        mixed = torch.randperm(len(drawn), generator=generator_for(self._seed, "epoch", epoch))
        return [drawn[i] for i in mixed.tolist()]

    def _drawn(self, number: int, share: SourceShare, k: int) -> int:
        """The k-th draw of a dataset in the run: it goes through all of its clips before any comes again."""
        turn, place = divmod(k, len(share.clips))
        return share.clips[_shuffled(len(share.clips), self._seed, number, turn)[place]]


@lru_cache(maxsize=64)
def _shuffled(count: int, seed: int, source: int, turn: int) -> list[int]:
    return torch.randperm(count, generator=generator_for(seed, "source", source, turn)).tolist()
