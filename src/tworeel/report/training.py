"""What is shown while it trains: loss, time of a step, remaining time, learning rate, memory."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from tworeel.report.console import console as shared_console
from tworeel.report.format import RunningMean, clock_time
from tworeel.report.progress import PLAIN_SECONDS
from tworeel.units import gibibytes

LOSS_DECAY = 0.98
TIME_DECAY = 0.9


@dataclass(frozen=True, kw_only=True)
class _Status:
    step: int
    loss: float
    """Smoothed over about 50 steps."""
    seconds: float
    """Of a step, smoothed over about 10."""
    rest: float
    """Seconds until the last step."""
    learning_rate: float | None
    memory: Mapping[str, int]


class TrainingDisplay:
    """Shows the steps of a run; on a terminal in place, elsewhere a line every ten seconds.

    The first and the last step always get their line.

    Args:
        last, first: steps of this run.
        losses: of the steps before, which a run that goes on has in its mean as if it had never stopped.
        console: where it is shown.
        clock: in seconds.
    """

    def __init__(
        self,
        last: int,
        *,
        first: int = 1,
        losses: Sequence[float] = (),
        console: Console = shared_console,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._first, self._last, self._console, self._clock = first, last, console, clock
        self._loss, self._seconds = RunningMean(LOSS_DECAY), RunningMean(TIME_DECAY)
        for loss in losses:
            self._loss.add(loss)
        self._live = Live(console=console, auto_refresh=False) if console.is_terminal else None
        if self._live:
            self._live.start()
        self._told: float | None = None
        self._untold: _Status | None = None

    def update(
        self,
        step: int,
        loss: float,
        seconds: float,
        memory: Mapping[str, int],
        learning_rate: float | None = None,
    ) -> None:
        """Show a step that is done.

        Args:
            step: counted from 1.
            loss: of this step alone.
            seconds: that the step took.
            memory: peak bytes by device.
            learning_rate: that the step used.
        """
        pace = self._seconds.add(seconds)
        status = _Status(
            step=step,
            loss=self._loss.add(loss),
            seconds=pace,
            rest=pace * (self._last - step),
            learning_rate=learning_rate,
            memory=memory,
        )
        if self._live:
            self._live.update(self._drawn(status), refresh=True)
        else:
            self._tell_now_and_then(status)

    def close(self) -> None:
        """Show what was held back; the display stays as it is."""
        if self._live:
            self._live.stop()
        elif self._untold:
            self._tell(self._untold)
        self._untold = None

    def _tell_now_and_then(self, status: _Status) -> None:
        now = self._clock()
        self._untold = status
        if self._told is None or now - self._told >= PLAIN_SECONDS or status.step == self._last:
            self._told = now
            self._tell(status)

    def _tell(self, status: _Status) -> None:
        self._untold = None
        rest = f"{clock_time(status.rest)} left"
        line = ", ".join((f"step {status.step} of {self._last}", rest, *_facts(status)))
        self._console.print(line, markup=False, soft_wrap=True)

    def _drawn(self, status: _Status) -> Group:
        bar = Table.grid(padding=(0, 1))
        done = status.step - self._first + 1
        bar.add_row(
            "Training",
            ProgressBar(total=self._last - self._first + 1, completed=done, width=30),
            f"{status.step}/{self._last}",
            f"{clock_time(status.rest)} left",
        )
        return Group(bar, Text(", ".join(_facts(status))))


def _facts(status: _Status) -> list[str]:
    rate = [] if status.learning_rate is None else [f"learning rate {status.learning_rate:.3g}"]
    memory = [f"{device} {gibibytes(size)}" for device, size in status.memory.items()]
    return [f"loss {status.loss:.4f}", f"{status.seconds:.3g} s a step", *rate, *memory]
