"""Pinned host memory that tensors of any size share."""

from __future__ import annotations

import logging
import threading
from collections import deque
from dataclasses import dataclass

import torch
from torch import Tensor

ALIGNMENT = 64
"""Of each tensor in a slab, in bytes."""
_AT_ONCE = 4
"""Tensors that a new slab has room for at least, if there is so much."""
GIB = 2**30

log = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class Place:
    """Some bytes of a slab."""

    slab: Tensor
    begin: int
    end: int
    reads: frozenset[torch.Event] = frozenset()
    """What must have happened before they are written."""

    @property
    def size(self) -> int:
        """In bytes."""
        return self.end - self.begin

    @property
    def is_whole(self) -> bool:
        """Whether it is all of its slab."""
        return self.size == self.slab.nbytes

    def touches(self, other: Place) -> bool:
        """Whether one begins where the other ends."""
        return self.slab is other.slab and (self.begin == other.end or self.end == other.begin)


class HostPool:
    """Pinned memory that is used again and again.

    Tensors get places in slabs, whose sizes are powers of two (see `slab_size`). A larger
    tensor than all free places takes the room of slabs that are not in use.

    Args:
        limit: bytes that may be pinned; what does not fit stays on its device. None for no limit.
    """

    def __init__(self, limit: int | None = None) -> None:
        self.limit = limit
        self.held = 0
        """Bytes that are pinned so far, in use or not."""
        self._free: list[Place] = []
        self._returned: deque[Place] = deque()
        self._lock = threading.Lock()
        self._has_warned = False

    def limit_to(self, limit: int | None) -> None:
        """Let so many bytes be pinned from now on; what is more and not in use is given up."""
        with self._lock:
            self._join_returned()
            self.limit = limit
            if limit is not None and self._give_up_unused(0, partly=True):
                _empty_host_cache()

    def take(self, size: int, *, pinned: bool = True) -> Place | None:
        """A place of at least `size` bytes; None at the limit, of which the first time is told."""
        size = -(-size // ALIGNMENT) * ALIGNMENT
        with self._lock:
            self._join_returned()
            fitting = [place for place in self._free if place.size >= size]
            if not fitting and (new := self._new_slab(size, pinned)):
                fitting = [new]
                self._free.append(new)
            if fitting:
                return self._cut(min(fitting, key=lambda place: place.size), size)
            self._warn()
            return None

    def give_back(self, place: Place, read: torch.Event | None) -> None:
        """Let other tensors have the place once `read` has happened."""
        # Without the lock: a collection of garbage may give places back at any moment, in `take` too.
        reads = frozenset() if read is None else frozenset({read})
        self._returned.append(Place(place.slab, place.begin, place.end, reads))

    def _join_returned(self) -> None:
        """Let what was given back be free, in one with what is free beside it."""
        while self._returned:
            place = self._returned.popleft()
            parts = [place, *(other for other in self._free if other.touches(place))]
            reads = frozenset(event for part in parts for event in part.reads if not event.query())
            begin, end = min(part.begin for part in parts), max(part.end for part in parts)
            self._free = [other for other in self._free if other not in parts]
            self._free.append(Place(place.slab, begin, end, reads))

    def _cut(self, place: Place, size: int) -> Place:
        """Take so many bytes of a free place."""
        self._free.remove(place)
        middle = place.begin + size
        if middle < place.end:
            self._free.append(Place(place.slab, middle, place.end, place.reads))
        return Place(place.slab, place.begin, middle, place.reads)

    def _new_slab(self, size: int, pinned: bool) -> Place | None:
        """All of a new slab, for several tensors of a size if there is room for that."""
        least, wanted = (pinned_size(size), slab_size(size)) if pinned else (size, size)
        if self.limit is not None:
            if self._give_up_unused(least):
                _empty_host_cache()
            room = self.limit - self.held
            if room < least:
                return None
            if room < wanted:
                wanted = 1 << (room.bit_length() - 1)
        slab = torch.empty(wanted, dtype=torch.uint8, pin_memory=pinned)
        self.held += wanted
        return Place(slab, 0, wanted)

    def _give_up_unused(self, needed: int, *, partly: bool = False) -> bool:
        """Let go of slabs that are not in use, the largest first, if that makes room for `needed` bytes.

        All are smaller than what is needed, which would be in one of them otherwise: so this comes to an end.
        """
        assert self.limit is not None
        missing = needed - (self.limit - self.held)
        unused = sorted((place for place in self._free if place.is_whole), key=lambda place: place.size)
        is_enough = partly or sum(place.size for place in unused) >= missing
        if missing <= 0 or not unused or not is_enough:
            return False
        while missing > 0 and unused:
            place = unused.pop()
            self._free.remove(place)
            self.held -= place.size
            missing -= place.size
        return True

    def _warn(self) -> None:
        if self.limit is not None and not self._has_warned:
            self._has_warned = True
            log.warning(
                "activations that should wait in host memory stay on their devices: "
                "the limit of %.1f GiB is reached",
                self.limit / GIB,
            )


def pinned_size(size: int) -> int:
    """What an allocation of so many bytes takes of pinned memory: torch rounds up to a power of two."""
    return 1 << (size - 1).bit_length()


def slab_size(size: int) -> int:
    """Bytes of a slab for tensors of a size: of two powers of two the one that they fill better."""
    least = pinned_size(_AT_ONCE * size)
    return max(least, 2 * least, key=lambda slab: slab // size * size / slab)


def pool_bytes(total: int, size: int) -> int:
    """Bytes that a pool pins for `total` bytes in tensors of one size."""
    if not size:
        return total
    slab = slab_size(size)
    whole, rest = divmod(-(-total // size), slab // size)
    return whole * slab + (pinned_size(rest * size) if rest else 0)


def _empty_host_cache() -> None:
    """Unpin what nothing refers to any more; torch would keep it."""
    if torch.accelerator.is_available():
        # Until then a copy may read it.
        for index in range(torch.accelerator.device_count()):
            torch.accelerator.synchronize(index)
        # torch 2.11 has it for CUDA alone, and private
        (getattr(torch.accelerator, "empty_host_cache", None) or torch._C._host_emptyCache)()
