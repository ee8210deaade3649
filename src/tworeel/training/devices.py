"""The devices of a run: which there are, and what they hold."""

from __future__ import annotations

from collections.abc import Sequence

import psutil
import torch

from tworeel.engine.fitting import total_and_free
from tworeel.errors import raise_if_any
from tworeel.host_memory import available_memory


def available_devices() -> list[str]:
    """All accelerators; the CPU where there are none."""
    if not torch.accelerator.is_available():
        return ["cpu"]
    kind = torch.accelerator.current_accelerator()
    assert kind is not None
    return [f"{kind.type}:{i}" for i in range(torch.accelerator.device_count())]


def resolve_devices(names: Sequence[str] | None, key: str = "engine.devices") -> tuple[torch.device, ...]:
    """Turn names into devices; all that there are by default.

    Args:
        names: as torch has them.
        key: option that they come from.

    Raises:
        UserError: lists every name that is no device of this machine.
    """
    there = [*available_devices(), "cpu"]
    wanted = available_devices() if names is None else list(names)
    raise_if_any(
        f"{key}: '{name}' does not exist; there are {', '.join(dict.fromkeys(there))}"
        for name in wanted
        if _full_name(name) not in there
    )
    return tuple(torch.device(_full_name(name)) for name in wanted)


def _full_name(name: str) -> str:
    """`cuda` is the first of its kind; torch compares `cuda` and `cuda:0` as different."""
    return name if ":" in name or name == "cpu" else f"{name}:0"


def forget_peaks(devices: Sequence[torch.device]) -> None:
    """Let `peak_memory` tell of what is held from here on."""
    for device in set(devices):
        if device.type != "cpu":
            torch.accelerator.reset_peak_memory_stats(device)


def peak_memory(devices: Sequence[torch.device]) -> dict[str, int]:
    """The most bytes that this process has held on each device so far; on the CPU what it holds now."""
    return {
        str(device): psutil.Process().memory_info().rss
        if device.type == "cpu"
        else torch.accelerator.max_memory_allocated(device)
        for device in dict.fromkeys(devices)
    }


def room(devices: Sequence[torch.device]) -> dict[str, int]:
    """Bytes that this process may have of each device now, with what it holds already."""
    found = {}
    for device in dict.fromkeys(devices):
        if device.type == "cpu":
            found["cpu"] = available_memory() + psutil.Process().memory_info().rss
        else:
            _, free = total_and_free(device)
            found[str(device)] = free + torch.accelerator.memory_allocated(device)
    return found
