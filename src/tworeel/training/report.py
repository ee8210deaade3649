"""What a run tells those who watch it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from tworeel.data.clips import Bucket
from tworeel.workers import Observer, SilentObserver


@dataclass(frozen=True, kw_only=True)
class StepReport:
    """One optimizer step."""

    step: int
    """Counted from 1."""
    loss: float
    grad_norm: float
    learning_rate: float
    seconds: float
    memory: Mapping[str, int]
    """Peak bytes by device."""
    busy: tuple[float, ...]
    """Share of the step in which each stage computed."""
    buckets: tuple[Bucket, ...]
    """Of its clips."""


@dataclass(frozen=True, kw_only=True)
class Result:
    """What a run leaves behind."""

    lora: Path
    steps: int
    folder: Path
    expert: str | None = None
    """Which expert of the model the LoRA is for."""


class RunObserver(Observer, Protocol):
    """Sees the phases of a run and each of its steps; `poll` may raise to stop it."""

    def say(self, line: str) -> None:
        """Something that the user should know."""

    def train(self, first: int, last: int, losses: Sequence[float]) -> None:
        """Training begins with step `first`, after some with these losses, and will end after step `last`."""

    def step(self, report: StepReport) -> None:
        """A step is done."""


class SilentRun(SilentObserver):
    """Shows nothing and never stops."""

    def say(self, line: str) -> None: ...

    def train(self, first: int, last: int, losses: Sequence[float]) -> None: ...

    def step(self, report: StepReport) -> None: ...
