"""Which clip is trained on when, and everything random about it: pure functions of the seed and the step.

Nothing here has state, so a resumed run needs none: it goes on with the next step, on any devices.
"""

from __future__ import annotations

import bisect
import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
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
    per_epoch: Fraction
    """On average: where it is no whole number, some epochs draw one more than others."""

    def drawn_before(self, epoch: int) -> int:
        """How many clips the epochs before this one draw."""
        return math.floor(epoch * self.per_epoch)


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
                rate = Fraction(weight).limit_denominator(10**6) * len(indices)
                self._shares.append(SourceShare(indices, max(rate, Fraction(1, 10**6))))

    def clip_at(self, position: int) -> int:
        """Index of the clip at a position of the run: step × micro-batches a step + micro-batch."""
        epoch = self._epoch_of(position)
        return self._epoch(epoch)[position - self._start(epoch)]

    def _epoch_of(self, position: int) -> int:
        """The last epoch that starts at or before `position`: one before it may draw nothing at all."""
        rate = sum(share.per_epoch for share in self._shares)
        enough = math.ceil((position + len(self._shares) + 1) / rate) + 1
        return bisect.bisect_right(range(enough), position, key=self._start) - 1

    def _start(self, epoch: int) -> int:
        """The position of an epoch's first clip."""
        return sum(share.drawn_before(epoch) for share in self._shares)

    @lru_cache(maxsize=2)  # noqa: B019  one order a run
    def _epoch(self, epoch: int) -> list[int]:
        drawn = [
            self._drawn(number, share, k)
            for number, share in enumerate(self._shares)
            for k in range(share.drawn_before(epoch), share.drawn_before(epoch + 1))
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
