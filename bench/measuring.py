"""What the scripts share: time and memory by phase, devices, tables and JSON."""

from __future__ import annotations

import argparse
import json
import os
import threading
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Self

import psutil
import torch
from rich.console import Console

from tworeel.benchmarks import machine
from tworeel.files import write_text_atomic
from tworeel.report.benchmark import fact_lines, plain_table
from tworeel.units import GIB

SAMPLE_SECONDS = 0.02

console = Console(highlight=False, width=None if os.isatty(1) else 120)


@dataclass(kw_only=True)
class Phase:
    """What one part of a run took; parts that come several times add up."""

    name: str
    seconds: float = 0.0
    host_peak: int = 0
    """Most anonymous host memory, in bytes."""
    host_growth: int = 0
    """The most that anonymous host memory rose from a low earlier in the phase, in bytes."""
    allocated: dict[str, int] = field(default_factory=dict)
    """Most bytes in tensors by device."""
    reserved: dict[str, int] = field(default_factory=dict)
    """Most bytes that torch's allocator held by device."""


class Meter:
    """Measures one phase after the other, until it is closed.

    Host memory is sampled by a thread. It is the process's anonymous memory: pages of mapped files, which
    the system can drop at any time, do not count.
    """

    def __init__(self, devices: Iterable[torch.device]) -> None:
        self.phases: dict[str, Phase] = {}
        self._devices = [device for device in dict.fromkeys(devices) if device.type != "cpu"]
        self._running: Phase | None = None
        self._window = _Window()
        self._closed = threading.Event()
        self._sampler = threading.Thread(target=self._sample, daemon=True)

    def __enter__(self) -> Self:
        self._sampler.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.end()
        self._closed.set()
        self._sampler.join()

    def begin(self, name: str) -> None:
        """End the phase that runs and begin one called `name`."""
        self.end()
        self._running = self.phases.setdefault(name, Phase(name=name))
        for device in self._devices:
            torch.accelerator.reset_peak_memory_stats(device)
        self._window = _Window()

    def end(self) -> None:
        """End the phase that runs, if one does."""
        phase, self._running = self._running, None
        if phase is None:
            return
        for device in self._devices:
            torch.accelerator.synchronize(device)
        self._window.sample()
        phase.seconds += time.perf_counter() - self._window.began
        phase.host_peak = max(phase.host_peak, self._window.peak)
        phase.host_growth = max(phase.host_growth, self._window.growth)
        for device in self._devices:
            name = str(device)
            allocated = torch.accelerator.max_memory_allocated(device)
            reserved = torch.accelerator.max_memory_reserved(device)
            phase.allocated[name] = max(phase.allocated.get(name, 0), allocated)
            phase.reserved[name] = max(phase.reserved.get(name, 0), reserved)

    def _sample(self) -> None:
        while not self._closed.wait(SAMPLE_SECONDS):
            self._window.sample()


class _Window:
    """Host memory since a phase began: its peak, and the most that it rose from a low before."""

    def __init__(self) -> None:
        self._low = self.peak = anonymous_memory()
        self.growth = 0
        self.began = time.perf_counter()

    def sample(self) -> None:
        """Look once."""
        now = anonymous_memory()
        self._low = min(self._low, now)
        self.peak = max(self.peak, now)
        self.growth = max(self.growth, now - self._low)


def anonymous_memory() -> int:
    """Bytes of host memory that belong to the process alone; where the system does not tell, all of it."""
    info = psutil.Process().memory_info()
    return int(info.rss - getattr(info, "shared", 0))


def default_devices(count: int = 2) -> list[torch.device]:
    """The first accelerators, one of them several times if there are too few, else the CPU."""
    if not torch.accelerator.is_available():
        return [torch.device("cpu")] * count
    kind = torch.accelerator.current_accelerator()
    assert kind is not None
    there = torch.accelerator.device_count()
    return [torch.device(kind.type, min(i, there - 1)) for i in range(count)]


def devices_from(names: str | None) -> list[torch.device]:
    """`cuda:0,cuda:1` as devices; two by default."""
    return [torch.device(name) for name in names.split(",")] if names else default_devices()


def one_device_parser(description: str | None, *, blocks: int, figures: str) -> argparse.ArgumentParser:
    """The options of a script that compares two things on one device.

    Args:
        description: of the script.
        blocks: of the model, by default.
        figures: name of the file for them, by default.
    """
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", help="for example cuda:1; the first GPU by default")
    parser.add_argument("--blocks", type=int, default=blocks, help=f"of the model ({blocks})")
    parser.add_argument("--rounds", type=int, default=5, help="of each, in turns (5)")
    parser.add_argument("--json", type=Path, default=Path(figures), help="file for the figures")
    parser.add_argument("--tiny", action="store_true", help="a tiny model, on the CPU")
    return parser


def one_device(options: argparse.Namespace) -> tuple[torch.device, dict[str, Any]]:
    """The device of `one_device_parser`'s options, awake, and what the machine is, which is told."""
    device = devices_from(options.device)[0]
    facts = machine.facts([device])
    print_machine(facts)
    machine.wake([device])
    return device, facts


def print_machine(facts: dict[str, Any]) -> None:
    """Write what `tworeel.benchmarks.machine.facts` found, one line a fact."""
    for line in fact_lines(facts):
        console.print(line, markup=False, soft_wrap=True)


def print_table(title: str, columns: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Write a table; the first column is text, the others are numbers."""
    console.print(plain_table(title, columns, rows))


def print_phases(title: str, phases: Iterable[Phase]) -> None:
    """Write what each phase took."""
    print_table(
        title,
        ("phase", "seconds", "host peak", "host growth", "device peak (reserved)"),
        (
            (
                phase.name,
                f"{phase.seconds:.2f}",
                gib(phase.host_peak),
                gib(phase.host_growth),
                ", ".join(
                    f"{name} {gib(size)} ({gib(phase.reserved[name])})"
                    for name, size in phase.allocated.items()
                ),
            )
            for phase in phases
        ),
    )


def gib(size: float) -> str:
    """Bytes -> `21.37 GiB`."""
    return f"{size / GIB:.2f} GiB"


def as_json(phases: Iterable[Phase]) -> list[dict[str, Any]]:
    """Phases as plain JSON."""
    return [asdict(phase) for phase in phases]


def add_results(path: Path, results: dict[str, Any], *, quiet: bool = False) -> None:
    """Write `results` into the JSON file, over those of the same names and beside the others.

    Args:
        path: of the file.
        results: by name.
        quiet: do not say where they are.
    """
    known = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    path.parent.mkdir(parents=True, exist_ok=True)
    # A run that is killed while it writes keeps what was there.
    write_text_atomic(path, json.dumps({**known, **results}, indent=1) + "\n")
    if quiet:
        return
    console.print(f"written to {path}", markup=False, soft_wrap=True)
