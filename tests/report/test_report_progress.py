from __future__ import annotations

import io

import pytest
from rich.console import Console

from tworeel.report.progress import PLAIN_SECONDS, PlainBar, open_bar, progress_bar


class Clock:
    """A clock that is moved by hand."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def plain() -> Console:
    return Console(file=io.StringIO(), width=40)


def written(console: Console) -> str:
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_without_a_terminal_a_line_comes_now_and_then() -> None:
    console, clock = plain(), Clock()
    bar = PlainBar("Scanning", 100, console, clock)
    for _ in range(50):
        clock.now += PLAIN_SECONDS / 20
        bar.advance()
    bar.close()
    assert written(console).splitlines() == [
        "Scanning: 0 of 100",
        "Scanning: 20 of 100, 2/s, 0:00:40 left",
        "Scanning: 40 of 100, 2/s, 0:00:30 left",
        "Scanning: 50 of 100, 2/s, took 0:00:25",
    ]


def test_a_total_that_is_not_known_is_not_shown() -> None:
    console, clock = plain(), Clock()
    bar = PlainBar("Scanning", None, console, clock)
    clock.now += PLAIN_SECONDS * 2
    bar.advance()
    bar.close()
    assert written(console).splitlines() == [
        "Scanning: 0",
        "Scanning: 1, 20 s each",
        "Scanning: 1, 20 s each, took 0:00:20",
    ]


@pytest.mark.parametrize("total", [3, None])
def test_on_a_terminal_the_bar_shows_the_count(total: int | None) -> None:
    console = Console(file=io.StringIO(), force_terminal=True, width=100)
    bar = open_bar("Scanning", total, console)
    for _ in range(3):
        bar.advance()
    bar.close()
    assert "Scanning" in written(console)
    assert f"3/{total or '?'}" in written(console)


def test_an_error_inside_ends_the_bar_and_passes(capsys: pytest.CaptureFixture[str]) -> None:
    def work() -> None:
        with progress_bar("Scanning", 3) as tick:
            tick()
            raise KeyError

    with pytest.raises(KeyError):
        work()
    assert "Scanning: 1 of 3" in capsys.readouterr().out
