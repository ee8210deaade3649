"""How far long work is: bars on a terminal, lines now and then elsewhere."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Protocol

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TextColumn
from rich.text import Text

from tworeel.report.console import console as shared_console
from tworeel.report.format import clock_time

PLAIN_SECONDS = 10.0
"""Least time between two lines where there is no terminal."""


class Bar(Protocol):
    """Progress of one phase."""

    def advance(self) -> None:
        """One more item is done."""

    def close(self) -> None:
        """The phase is over, done or not."""


@contextmanager
def progress_bar(title: str, total: int | None = None) -> Iterator[Callable[[], None]]:
    """Show progress with rate and remaining time; call what it gives after each item.

    Args:
        title: of the phase.
        total: number of items, if it is known.
    """
    bar = open_bar(title, total)
    try:
        yield bar.advance
    finally:
        bar.close()


def open_bar(title: str, total: int | None, console: Console = shared_console) -> Bar:
    """Return a bar that suits the console: live on a terminal, plain lines elsewhere."""
    return LiveBar(title, total, console) if console.is_terminal else PlainBar(title, total, console)


class LiveBar:
    """A bar that is drawn anew in place."""

    def __init__(self, title: str, total: int | None, console: Console) -> None:
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            _RateColumn(),
            console=console,
        )
        self._task = self._progress.add_task(title, total=total)
        self._progress.start()

    def advance(self) -> None:
        self._progress.advance(self._task)

    def close(self) -> None:
        self._progress.stop()


class _RateColumn(ProgressColumn):
    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed
        return Text(_rate_and_rest(speed, task.time_remaining, task.elapsed if task.finished else None))


class PlainBar:
    """A line when the phase begins, one every `PLAIN_SECONDS`, and one at its end."""

    def __init__(
        self, title: str, total: int | None, console: Console, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._title, self._total, self._console, self._clock = title, total, console, clock
        self._done = 0
        self._begun = self._told = clock()
        self._tell("")

    def advance(self) -> None:
        self._done += 1
        now = self._clock()
        if now - self._told >= PLAIN_SECONDS:
            self._told = now
            speed = self._done / (now - self._begun)
            rest = (self._total - self._done) / speed if self._total else None
            self._tell(_rate_and_rest(speed, rest, None))

    def close(self) -> None:
        seconds = self._clock() - self._begun
        self._tell(_rate_and_rest(self._done / seconds if seconds else None, None, seconds))

    def _tell(self, more: str) -> None:
        count = f"{self._done} of {self._total}" if self._total else str(self._done)
        line = ", ".join(filter(None, (f"{self._title}: {count}", more)))
        self._console.print(line, markup=False, soft_wrap=True)


def _rate_and_rest(speed: float | None, rest: float | None, elapsed: float | None) -> str:
    """Return for example `12.3/s, 0:01:10 left`, or `12.3/s, took 0:02:00` when it is over."""
    parts = [_rate(speed)] if speed else []
    if elapsed is not None:
        parts.append(f"took {clock_time(elapsed)}")
    elif rest is not None:
        parts.append(f"{clock_time(rest)} left")
    return ", ".join(parts)


def _rate(speed: float) -> str:
    if speed < 1:
        return f"{1 / speed:.3g} s each"
    return f"{speed:.3g}/s" if speed < 100 else f"{speed:,.0f}/s"
