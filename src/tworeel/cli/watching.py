"""Shows a run on the console and passes signals on to it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

from tworeel.report.console import say
from tworeel.report.progress import Bar, open_bar
from tworeel.report.training import TrainingDisplay
from tworeel.signals import StopFlag

if TYPE_CHECKING:
    from tworeel.training.report import StepReport


class ConsoleObserver:
    """The `RunObserver` of the command line; `poll` raises `Stopped` after a signal."""

    def __init__(self, flag: StopFlag) -> None:
        self._flag = flag
        self._bar: Bar | None = None
        self._display: TrainingDisplay | None = None

    def start(self, title: str, total: int) -> None:
        self._bar = open_bar(title, total or None)

    def advance(self) -> None:
        assert self._bar, "no phase has begun"
        self._bar.advance()

    def poll(self) -> None:
        self._flag.check()

    def finish(self) -> None:
        assert self._bar, "no phase has begun"
        self._bar.close()
        self._bar = None

    def say(self, line: str) -> None:
        say(line)

    def train(self, first: int, last: int, losses: Sequence[float]) -> None:
        self._display = TrainingDisplay(last, first=first, losses=losses)

    def step(self, report: StepReport) -> None:
        assert self._display, "training has not begun"
        self._display.update(report.step, report.loss, report.seconds, report.memory, report.learning_rate)

    def close(self) -> None:
        """End what is shown, however the run ended."""
        if self._bar:
            self._bar.close()
        if self._display:
            self._display.close()


@contextmanager
def watching() -> Iterator[ConsoleObserver]:
    """Listen to signals and show what goes on inside."""
    with StopFlag() as flag:
        observer = ConsoleObserver(flag)
        try:
            yield observer
        finally:
            observer.close()
