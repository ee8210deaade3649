"""An observer that keeps what it hears."""

from __future__ import annotations


class Listener:
    """Keeps what is said."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def say(self, line: str) -> None:
        self.lines.append(line)

    def poll(self) -> None:
        pass
