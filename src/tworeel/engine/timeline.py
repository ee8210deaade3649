"""Who computed what, when: the spans of one step, measured on the devices themselves."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch

from tworeel.engine.schedule import Action


@dataclass(frozen=True)
class Span:
    """One action, in seconds since the step began."""

    action: Action
    start: float
    end: float


class Timeline:
    """Marks the begin and end of each action: events on an accelerator, the wall clock on the CPU.

    The clocks of several devices begin together, when all earlier work is done.
    """

    def __init__(self, devices: Sequence[torch.device]) -> None:
        self._devices = devices
        _wait_for(devices)
        self._begin = {device: _mark(device) for device in set(devices)}
        self._marks: list[tuple[Action, Any, Any]] = []

    @contextmanager
    def span(self, action: Action) -> Iterator[None]:
        """Measure what runs inside as `action`."""
        device = self._devices[action.stage]
        start = _mark(device)
        yield
        self._marks.append((action, start, _mark(device)))

    def spans(self) -> list[Span]:
        """All spans, in the order of their begin. Waits for the devices."""
        _wait_for(self._devices)
        found = [
            Span(action, *(_seconds(self._begin[self._devices[action.stage]], mark) for mark in marks))
            for action, *marks in self._marks
        ]
        return sorted(_without_waiting(found), key=lambda span: span.start)


def _without_waiting(spans: Sequence[Span]) -> Iterator[Span]:
    """Let no span begin before the micro-batch has left the stage that it comes from.

    The host runs ahead of an accelerator: an idle one passes the mark of the begin long before its input is
    there, and what it then waits for is not its own work.
    """
    left: dict[int, float] = {}
    for span in spans:  # a micro-batch's spans are in the order of its way
        number = span.action.micro_batch
        yield replace(span, start=min(max(span.start, left.get(number, span.start)), span.end))
        left[number] = span.end


def busy_shares(spans: Sequence[Span], num_stages: int) -> list[float]:
    """The share of the step's time in which each stage was at work."""
    duration = max(s.end for s in spans) - min(s.start for s in spans)
    return [sum(s.end - s.start for s in spans if s.action.stage == n) / duration for n in range(num_stages)]


def device_shares(spans: Sequence[Span], devices: Sequence[torch.device]) -> list[float]:
    """The share of the step's time in which each device was at work, whichever of its stages it was for.

    Args:
        spans: of one step.
        devices: of each stage. Each stage on a CPU counts as a device: they run side by side.
    """
    lanes = [(device, stage if device.type == "cpu" else 0) for stage, device in enumerate(devices)]
    duration = max(s.end for s in spans) - min(s.start for s in spans)
    seconds = (_covered([s for s in spans if lanes[s.action.stage] == lane]) for lane in dict.fromkeys(lanes))
    return [work / duration for work in seconds]


def _covered(spans: Sequence[Span]) -> float:
    """Seconds in which at least one of the spans lasts."""
    seconds, end = 0.0, 0.0
    for span in sorted(spans, key=lambda span: span.start):
        seconds += max(0.0, span.end - max(span.start, end))
        end = max(end, span.end)
    return seconds


def _wait_for(devices: Sequence[torch.device]) -> None:
    for device in set(devices):
        if device.type != "cpu":
            torch.accelerator.synchronize(device)


def _mark(device: torch.device) -> Any:
    if device.type == "cpu":
        return time.perf_counter()
    event = torch.Event(device, enable_timing=True)
    event.record(torch.accelerator.current_stream(device))
    return event


def _seconds(begin: Any, end: Any) -> float:
    return end - begin if isinstance(begin, float) else begin.elapsed_time(end) / 1000
