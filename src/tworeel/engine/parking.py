"""Activations that wait in pinned host memory between a block's forward and its backward.

They leave on a stream of their own while the next block computes, and are fetched back one block before they
are needed. The device's own stream waits for the copies at these places, so that their memory serves what is
queued next, however far the host runs ahead.
"""

from __future__ import annotations

import threading
import weakref
from collections import defaultdict
from collections.abc import Collection, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from tworeel.engine.host_pool import HostPool, Place
from tworeel.engine.streams import Arrival, copy_in, copy_out, still_used

SMALLEST = 2**16
"""Tensors of fewer bytes are not worth a transfer."""


class Parked:
    """One tensor in host memory."""

    def __init__(self, tensor: Tensor, pool: HostPool, place: Place) -> None:
        self.device = tensor.device
        self._pool = pool
        self._place: Place | None = place
        self._host: Tensor | None = _view_like(place, tensor)
        self._fetched: Arrival | None = None
        self._leaving: Tensor | None = None
        self._last = copy_out(tensor, self._host, place.reads)
        if self._last is not None:
            self._leaving, self._version = tensor, tensor._version

    def let_go(self) -> None:
        """Free the device's memory for work that is queued from now on, which waits until it is copied.

        Raises:
            RuntimeError: it was written into meanwhile; `fetch` and `get` raise it, too.
        """
        leaving = self._take_leaving()
        if leaving is not None and self._last is not None:
            torch.accelerator.current_stream(self.device).wait_event(self._last)

    def fetch(self) -> None:
        """Begin to bring it back, unless it is still there."""
        if self._fetched is not None:
            return
        leaving = self._take_leaving()
        if leaving is not None:
            still_used(leaving, "out")
            self._fetched = Arrival(leaving)
        else:
            assert self._host is not None
            self._fetched = copy_in(self._host, self.device, self._last)
            self._last = self._fetched.event

    def get(self) -> Tensor:
        """The tensor on its device, for work that is queued from now on; it can be had once.

        Raises:
            RuntimeError: a second time, as `retain_graph=True` would want it.
        """
        if self._place is None:
            raise RuntimeError("activations in host memory are fetched once: they cannot be used again")
        self.fetch()
        assert self._fetched is not None
        tensor = self._fetched.wait()
        self._fetched = None
        self._leave()
        return tensor

    def _take_leaving(self) -> Tensor | None:
        """What is on its way; at once, as another thread of the device may let it go meanwhile."""
        leaving, self._leaving = self._leaving, None
        # With hooks of its own autograd does not look.
        if leaving is not None and leaving._version != self._version:
            self._leaving = leaving  # its copy is still under way
            raise RuntimeError("what a block parks was written into: it needs another residency")
        return leaving

    def _leave(self) -> None:
        # Not only when it is collected: the graph hangs in cycles.
        place, self._place, self._host = self._place, None, None
        if place is not None:
            self._pool.give_back(place, self._last)

    def __del__(self) -> None:
        # A step that failed: nothing has waited for the copies.
        if self._leaving is not None:
            still_used(self._leaving, "out")
        if self._fetched is not None and self._fetched.event is not None:
            still_used(self._fetched.tensor, "in")
        self._leave()


class Berth:
    """What one block of one micro-batch has parked.

    Args:
        pool: of host memory.
    """

    def __init__(self, pool: HostPool) -> None:
        self._pool = pool
        self._parked: list[Parked] = []

    def park(self, tensor: Tensor) -> Parked | Tensor:
        """Bring a tensor to host memory; it stays itself if it is small or there is no room."""
        if tensor.nbytes < SMALLEST or not _is_dense(tensor):
            return tensor
        place = self._pool.take(tensor.nbytes, pinned=tensor.device.type != "cpu")
        if place is None:
            return tensor
        parked = Parked(tensor, self._pool, place)
        self._parked.append(parked)
        return parked

    def let_go(self) -> None:
        """Free the device's memory of everything, for work that is queued from now on."""
        for one in self._parked:
            one.let_go()

    def prefetch(self) -> None:
        """Begin to bring everything back."""
        for one in self._parked:
            one.fetch()

    def get(self, parked: Parked | Tensor) -> Tensor:
        """What was parked."""
        if isinstance(parked, Tensor):
            return parked
        self._parked = [one for one in self._parked if one is not parked]
        return parked.get()

    @contextmanager
    def hooks(self, shared: Collection[int]) -> Iterator[None]:
        """Park what autograd saves inside.

        Args:
            shared: storages (see `storage_of`) that are not this block's alone: weights and constants.
        """

        def pack(tensor: Tensor) -> Parked | Tensor:
            return tensor if storage_of(tensor) in shared else self.park(tensor)

        with saved_tensors_hooks(pack, self.get):
            yield


class Departures:
    """The blocks whose activations are on their way from each device."""

    def __init__(self) -> None:
        self._under_way: dict[torch.device, list[weakref.ref[Berth]]] = defaultdict(list)
        self._lock = threading.Lock()
        """Two stages of one device run in threads of their own."""

    def begin(self, device: torch.device, berth: Berth | None) -> None:
        """A block was queued, and what it has parked begins to leave, during the next block."""
        self.settle(device)
        if berth is not None:
            # Not held: if a step fails, what it has parked goes with its graph.
            with self._lock:
                self._under_way[device].append(weakref.ref(berth))

    def settle(self, device: torch.device, but: Berth | None = None) -> None:
        """Work that is queued from now on may have the memory of what has left, but for one block's."""
        with self._lock:
            leaving = self._under_way.pop(device, [])
        for reference in leaving:
            berth = reference()
            if berth is not None and berth is not but:
                berth.let_go()


def storage_of(tensor: Tensor) -> int:
    """What tells a tensor's storage from all others that are held."""
    return tensor.untyped_storage().data_ptr()


def _is_dense(tensor: Tensor) -> bool:
    """Whether a tensor's elements fill its extent, in whatever order."""
    extent = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True)) + 1
    return extent == tensor.numel()


def _view_like(place: Place, tensor: Tensor) -> Tensor:
    host = place.slab[place.begin : place.begin + tensor.nbytes].view(tensor.dtype)
    return host.as_strided(tensor.shape, tensor.stride(), host.storage_offset())
