"""The machine that is measured on: its devices, how fast they multiply, and what memory they have used."""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import psutil
import torch
from torch.profiler import ProfilerActivity

from tworeel.engine.releasing import release_memory
from tworeel.errors import UserError, raise_if_any
from tworeel.training.devices import available_devices, resolve_devices
from tworeel.units import GIB

_MATMUL_ROUNDS = 20


@dataclass(frozen=True, kw_only=True)
class Peak:
    """The most memory of a device, in bytes."""

    allocated: int
    """In tensors."""
    reserved: int
    """Held by torch's allocator."""


def facts(devices: Iterable[torch.device]) -> dict[str, Any]:
    """What is measured on, and when."""
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


def wake(devices: Iterable[torch.device]) -> None:
    """Let each device make its context now, so that nothing that is measured pays for it."""
    for device in devices:
        torch.ones(1, device=device).sum().item()


def memory_limits(devices: Sequence[torch.device], cap: float | None) -> dict[str, int]:
    """How many bytes torch may use of each accelerator: all, or as `limit_memory` set it."""
    found = {}
    for device in accelerators(devices):
        module: Any = torch.get_device_module(device)
        total = int(module.get_device_properties(device).total_memory)
        found[str(device)] = total if cap is None else min(total, int(cap * GIB * devices.count(device)))
    return found


def limit_memory(devices: Sequence[torch.device], cap: float | None) -> None:
    """Let torch use no more than `cap` GiB for each stage: a device with two stages may use twice as much.

    None takes the limit away.

    Raises:
        UserError: a device is not CUDA's (or ROCm's under that name).
    """
    if cap is None:
        devices = [device for device in devices if device.type == "cuda"]
    raise_if_any(cap_problems(devices))
    for name, limit in memory_limits(list(devices), cap).items():
        total = torch.cuda.get_device_properties(name).total_memory
        torch.cuda.set_per_process_memory_fraction(limit / total, name)


def cap_problems(devices: Iterable[torch.device]) -> list[str]:
    """The devices whose memory cannot be limited, a line each."""
    return [
        f"--cap-gib: the memory of {device} cannot be limited, only that of CUDA devices"
        for device in dict.fromkeys(devices)
        if device.type != "cuda"
    ]


def matmul_rates(devices: Sequence[torch.device]) -> dict[str, float]:
    """Floating-point operations a second of each device in a product of two square matrices.

    bf16 and 8192³ on an accelerator, fp32 and 1024³ on the CPU; 2 n³ operations each, measured behind as many
    to warm up.
    """
    return {str(device): _matmul_rate(device) for device in dict.fromkeys(devices)}


def _matmul_rate(device: torch.device) -> float:
    on_cpu = device.type == "cpu"
    size, rounds = (1024, 2) if on_cpu else (8192, _MATMUL_ROUNDS)
    matrix = torch.randn(size, size, device=device, dtype=torch.float32 if on_cpu else torch.bfloat16)
    for _ in range(rounds):
        matrix @ matrix
    synchronize([device])
    begin = time.perf_counter()
    for _ in range(rounds):
        matrix @ matrix
    synchronize([device])
    return 2 * size**3 * rounds / (time.perf_counter() - begin)


def kernel_share(devices: Sequence[torch.device], work: Callable[[], object]) -> float | None:
    """The share of the time of `work` in which at least one device ran a kernel or a copy.

    None where torch's profiler cannot tell (only CUDA devices can).
    """
    if ProfilerActivity.CUDA not in torch.profiler.supported_activities() or not accelerators(devices):
        return None
    with torch.profiler.profile(activities=[ProfilerActivity.CUDA], acc_events=True) as profile:
        synchronize(devices)
        begin = time.perf_counter()
        work()
        synchronize(devices)
        seconds = time.perf_counter() - begin
    ranges = [event.time_range for event in profile.events() if "CUDA" in str(event.device_type)]
    return _covered([(span.start, span.end) for span in ranges]) / 1e6 / seconds if ranges else None


def _covered(intervals: Iterable[tuple[float, float]]) -> float:
    """Length of the union of intervals."""
    covered, reached = 0.0, float("-inf")
    for start, end in sorted(intervals):
        covered += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return covered


def accelerators(devices: Iterable[torch.device]) -> list[torch.device]:
    """The devices with memory of their own, each once."""
    return [device for device in dict.fromkeys(devices) if device.type != "cpu"]


def synchronize(devices: Iterable[torch.device]) -> None:
    """Wait until all that was queued on the devices is done."""
    for device in accelerators(devices):
        torch.accelerator.synchronize(device)


def peaks(devices: Iterable[torch.device]) -> dict[str, Peak]:
    """The peaks of each accelerator since `reset_peaks`."""
    return {
        str(device): Peak(
            allocated=torch.accelerator.max_memory_allocated(device),
            reserved=torch.accelerator.max_memory_reserved(device),
        )
        for device in accelerators(devices)
    }


def reset_peaks(devices: Iterable[torch.device]) -> None:
    """Let go of what is cached, and count peaks from here on."""
    release_memory()
    for device in accelerators(devices):
        torch.accelerator.reset_peak_memory_stats(device)
    if torch.cuda.is_initialized():
        torch.cuda.reset_peak_host_memory_stats()


def pinned_memory() -> int:
    """Most bytes of pinned host memory that torch has held (CUDA only)."""
    if not torch.cuda.is_initialized():
        return 0
    return int(torch.cuda.host_memory_stats().get("allocated_bytes.peak", 0))


def devices_of(names: Sequence[str] | None) -> tuple[torch.device, ...]:
    """Devices by name; all accelerators by default, and two stages on the CPU where there are none.

    Raises:
        UserError: a name is no device of this machine.
    """
    if names is None and available_devices() == ["cpu"]:
        names = ("cpu", "cpu")
    try:
        return resolve_devices(names)
    except UserError as error:
        raise UserError(*(f"--{problem.removeprefix('engine.')}" for problem in error.problems)) from None
