"""What the benchmarks share: time and memory by phase, the machine's name, tables and JSON."""

from __future__ import annotations

import json
import os
import platform
import threading
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Self

import psutil
import torch
from rich.console import Console
from rich.table import Table

GIB = 2**30
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


def pinned_memory() -> int:
    """Most bytes of pinned host memory that torch has held so far (CUDA only)."""
    if not torch.cuda.is_initialized():
        return 0
    return int(torch.cuda.host_memory_stats().get("allocated_bytes.peak", 0))


def machine(devices: Iterable[torch.device]) -> dict[str, Any]:
    """What was measured on, and when."""
    return {
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "devices": [device_name(device) for device in devices],
        "torch": torch.__version__,
        "python": platform.python_version(),
        "system": platform.platform(),
        "cores": os.cpu_count(),
        "memory_gib": round(psutil.virtual_memory().total / GIB, 1),
    }


def device_name(device: torch.device) -> str:
    """`cuda:0 (NVIDIA …, 31.4 GiB)`."""
    if device.type == "cpu":
        return f"cpu ({platform.processor() or platform.machine()})"
    module: Any = torch.get_device_module(device)
    properties = module.get_device_properties(device)
    return f"{device} ({properties.name}, {properties.total_memory / GIB:.1f} GiB)"


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


def wake(devices: Iterable[torch.device]) -> None:
    """Let each device make its context now, so that no phase pays for it."""
    for device in devices:
        torch.ones(1, device=device).sum().item()


def limit_memory(devices: Sequence[torch.device], limit: float) -> None:
    """Let torch use no more than `limit` GiB for each stage: a device with two stages may use twice as much.

    Raises:
        SystemExit: a device is not CUDA's (or ROCm's under that name).
    """
    for device in dict.fromkeys(devices):
        if device.type != "cuda":
            raise SystemExit(
                f"--cap-gib: the memory of {device} cannot be limited, only that of CUDA devices"
            )
        total = torch.cuda.get_device_properties(device).total_memory
        share = min(1.0, limit * GIB * list(devices).count(device) / total)
        torch.cuda.set_per_process_memory_fraction(share, device)


def print_machine(facts: dict[str, Any]) -> None:
    """Write what `machine` found, one line a fact."""
    for key, value in facts.items():
        text = ", ".join(value) if isinstance(value, list) else str(value)
        console.print(f"{key}: {text}", markup=False, soft_wrap=True)


def print_table(title: str, columns: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Write a table; the first column is text, the others are numbers."""
    table = Table(title=title)
    for number, column in enumerate(columns):
        table.add_column(column, justify="right" if number else "left")
    for row in rows:
        table.add_row(*row)
    console.print(table)


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


def add_results(path: Path, results: dict[str, Any]) -> None:
    """Write `results` into the JSON file, over those of the same names and beside the others."""
    known = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({**known, **results}, indent=1) + "\n", encoding="utf-8")
    console.print(f"written to {path}", markup=False, soft_wrap=True)
