"""Copies beside the computation: a device has a stream for what leaves it and one for what arrives, for each
other device.

`tensor.to(other_device)` on the current streams would wait for everything that is queued on both devices. And
the host runs ahead: a copy may be queued long before what it copies is made. On a stream that they shared,
copies from other devices would wait for that, too.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Literal

import torch
from torch import Tensor

HOST = torch.device("cpu")


@dataclass(frozen=True)
class Arrival:
    """A tensor that is on its way to its device, or there already."""

    tensor: Tensor
    event: torch.Event | None = None

    def wait(self) -> Tensor:
        """The tensor, for work that is queued from now on; the host does not wait."""
        if self.event is not None:
            stream = torch.accelerator.current_stream(self.tensor.device)
            stream.wait_event(self.event)
            self.tensor.record_stream(stream)
        return self.tensor


def start_copy(
    tensor: Tensor, device: torch.device, made: torch.Event | None = None, *, late: bool = False
) -> Arrival:
    """Begin to bring a tensor to a device, behind the work that makes it and beside all other.

    Args:
        tensor: that is copied.
        device: where it goes.
        made: happens when the tensor is there; behind all that is queued on its device by default.
        late: it is needed now: not behind copies of what is going to be made.
    """
    if tensor.device == device:
        return Arrival(tensor)
    if "cpu" in (tensor.device.type, device.type):
        return Arrival(_to_or_from_host(tensor, device))
    leaving = side_stream(tensor.device, "out", device, late)
    arriving = side_stream(device, "in", tensor.device, late)
    leaving.wait_event(made or mark(tensor.device))
    with using(arriving, leaving):
        copy = tensor.to(device, non_blocking=True)
    tensor.record_stream(leaving)
    return Arrival(copy, arriving.record_event())


def send(tensor: Tensor, device: torch.device) -> Tensor:
    """Copy a tensor to another device without making the host wait for what is queued there."""
    return start_copy(tensor, device).wait()


def copy_out(tensor: Tensor, host: Tensor, reads: Iterable[torch.Event]) -> torch.Event | None:
    """Begin to copy a tensor to pinned host memory, which may be written when all of `reads` have happened.

    The tensor must be held until work that is queued on its device waits for the copy: else see `still_used`.

    Returns:
        What happens when it is there; None if it is there already.
    """
    if tensor.device.type == "cpu":
        host.copy_(tensor)
        return None
    leaving = side_stream(tensor.device, "out", HOST)
    leaving.wait_event(mark(tensor.device))
    for read in reads:
        leaving.wait_event(read)
    with using(leaving):
        host.copy_(tensor, non_blocking=True)
    return leaving.record_event()


def copy_in(host: Tensor, device: torch.device, ready: torch.Event | None) -> Arrival:
    """Begin to copy from pinned host memory, which is written after `ready`, to a new tensor.

    The tensor's memory is of the current stream, behind what is queued there: what that frees it may have. It
    must be held until work that is queued there waits for the copy: else see `still_used`.
    """
    if device.type == "cpu":
        return Arrival(host.clone())
    copy = torch.empty_like(host, device=device, pin_memory=False)
    arriving = side_stream(device, "in", HOST)
    arriving.wait_event(mark(device))
    if ready is not None:
        arriving.wait_event(ready)
    with using(arriving):
        copy.copy_(host, non_blocking=True)
    return Arrival(copy, arriving.record_event())


def still_used(tensor: Tensor, direction: Literal["in", "out"]) -> None:
    """Let no other tensor have a tensor's memory before its copy from or to the host is done."""
    tensor.record_stream(side_stream(tensor.device, direction, HOST))


@cache
def side_stream(
    device: torch.device, direction: Literal["in", "out"], other: torch.device, late: bool = False
) -> torch.Stream:
    """The device's stream for copies from or to another one, the same whenever it is asked for.

    Args:
        device: whose stream it is.
        direction: whether the copies arrive or leave.
        other: where they come from or go to.
        late: as for `start_copy`.
    """
    return torch.Stream(device)


@contextmanager
def using(*streams: torch.Stream) -> Iterator[None]:
    """Queue on these streams what this thread does inside, each on its own device.

    Not `with stream`: that keeps what it returns to in the stream object, which several threads share.
    """
    device = torch.accelerator.current_device_index()
    before = [torch.accelerator.current_stream(stream.device) for stream in streams]
    try:
        for stream in streams:
            torch.accelerator.set_stream(stream)
        yield
    finally:
        for stream in before:
            torch.accelerator.set_stream(stream)
        torch.accelerator.set_device_index(device)


def mark(device: torch.device) -> torch.Event:
    """An event behind everything that is queued on the device's current stream."""
    event = torch.Event(device)
    event.record(torch.accelerator.current_stream(device))
    return event


def _to_or_from_host(tensor: Tensor, device: torch.device) -> Tensor:
    if tensor.device.type == "cpu" and device.type != "cpu":
        # From pageable memory the driver would first drain the device's stream.
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=device.type != "cpu")
