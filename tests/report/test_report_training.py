from __future__ import annotations

import io

import pytest
from rich.console import Console

from tworeel.report.format import RunningMean, clock_time
from tworeel.report.progress import PLAIN_SECONDS
from tworeel.report.training import TrainingDisplay

MEMORY = {"cuda:0": 3 * 2**30, "cuda:1": 2**30}


def test_without_a_terminal_lines_come_now_and_then_and_the_last_step_has_one() -> None:
    console, now = Console(file=io.StringIO(), width=40), [0.0]
    display = TrainingDisplay(100, console=console, clock=lambda: now[0])
    for step in range(1, 101):
        now[0] += PLAIN_SECONDS / 20
        display.update(step, loss=1.0, seconds=2.0, memory=MEMORY, learning_rate=1e-4)
    display.close()
    assert isinstance(console.file, io.StringIO)
    lines = console.file.getvalue().splitlines()
    assert [line.split()[1] for line in lines] == ["1", "21", "41", "61", "81", "100"]
    assert lines[1] == (
        "step 21 of 100, 0:02:38 left, loss 1.0000, 2 s a step, learning rate 0.0001, "
        "cuda:0 3.0 GiB, cuda:1 1.0 GiB"
    )


def test_the_mean_loss_goes_on_where_the_run_before_has_ended() -> None:
    shown = []
    for first in (1, 6):
        console = Console(file=io.StringIO(), width=200)
        display = TrainingDisplay(10, first=first, losses=[5.0] * (first - 1), console=console)
        for step in range(first, 11):
            display.update(step, loss=5.0 if step < 6 else 1.0, seconds=2.0, memory={})
        display.close()
        assert isinstance(console.file, io.StringIO)
        shown.append(console.file.getvalue().splitlines()[-1])
    assert shown[0] == shown[1] and "loss 2.8991" in shown[0]


def test_a_run_that_is_stopped_shows_its_last_step() -> None:
    console = Console(file=io.StringIO(), width=200)
    display = TrainingDisplay(100, console=console, clock=lambda: 0.0)
    for step in range(1, 8):
        display.update(step, loss=1.0, seconds=2.0, memory={})
    display.close()
    assert isinstance(console.file, io.StringIO)
    assert console.file.getvalue().splitlines()[-1].startswith("step 7 of 100")


def test_on_a_terminal_everything_is_shown_in_place() -> None:
    console = Console(file=io.StringIO(), force_terminal=True, width=100)
    display = TrainingDisplay(20, first=11, console=console)
    display.update(11, loss=0.5, seconds=2.0, memory=MEMORY, learning_rate=1e-4)
    display.close()
    assert isinstance(console.file, io.StringIO)
    for words in ("11/20", "loss 0.5000", "2 s a step", "0:00:18 left", "0.0001", "cuda:1 1.0 GiB"):
        assert words in console.file.getvalue()


def test_the_running_mean_starts_at_the_first_value_and_follows() -> None:
    mean = RunningMean(0.9)
    assert mean.add(4.0) == 4.0
    assert mean.add(0.0) == pytest.approx(0.9 * 4 / 1.9)
    for _ in range(200):
        last = mean.add(1.0)
    assert last == pytest.approx(1.0)


def test_times_are_readable() -> None:
    assert (clock_time(3723.4), clock_time(0.2), clock_time(-1)) == ("1:02:03", "0:00:00", "0:00:00")
