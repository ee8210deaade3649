"""Who computed what, when: the spans of one step, measured on the devices themselves."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
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
    """Marks the begin and end of each action: events on an accelerator, the wall clock on the CPU."""

    def __init__(self, devices: Sequence[torch.device]) -> None:
        self._devices = devices
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
        for device in self._begin:
            if device.type != "cpu":
                torch.accelerator.synchronize(device)
        found = [
            Span(action, *(_seconds(self._begin[self._devices[action.stage]], mark) for mark in marks))
            for action, *marks in self._marks
        ]
        return sorted(found, key=lambda span: span.start)


def busy_shares(spans: Sequence[Span], num_stages: int) -> list[float]:
    """The share of the step's time in which each stage was at work."""
    duration = max(s.end for s in spans) - min(s.start for s in spans)
    return [sum(s.end - s.start for s in spans if s.action.stage == n) / duration for n in range(num_stages)]


def _mark(device: torch.device) -> Any:
    if device.type == "cpu":
        return time.perf_counter()
    event = torch.Event(device, enable_timing=True)
    event.record(torch.accelerator.current_stream(device))
    return event


def _seconds(begin: Any, end: Any) -> float:
    return end - begin if isinstance(begin, float) else begin.elapsed_time(end) / 1000
