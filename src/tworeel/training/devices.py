"""The devices of a run: which there are, and what they hold."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import psutil
import torch

from tworeel.errors import UserError, raise_if_any


def available_devices() -> list[str]:
    """All accelerators; the CPU where there are none."""
    if not torch.accelerator.is_available():
        return ["cpu"]
    kind = torch.accelerator.current_accelerator()
    assert kind is not None
    return [f"{kind.type}:{i}" for i in range(torch.accelerator.device_count())]


def resolve_devices(names: Sequence[str] | None) -> tuple[torch.device, ...]:
    """Turn names into devices; all that there are by default.

    Raises:
        UserError: lists every name that is no device of this machine.
    """
    there = [*available_devices(), "cpu"]
    wanted = available_devices() if names is None else list(names)
    raise_if_any(
        f"engine.devices: '{name}' does not exist; there are {', '.join(dict.fromkeys(there))}"
        for name in wanted
        if _full_name(name) not in there
    )
    return tuple(torch.device(_full_name(name)) for name in wanted)


def _full_name(name: str) -> str:
    """`cuda` is the first of its kind; torch compares `cuda` and `cuda:0` as different."""
    return name if ":" in name or name == "cpu" else f"{name}:0"


def peak_memory(devices: Sequence[torch.device]) -> dict[str, int]:
    """The most bytes that this process has held on each device so far; on the CPU what it holds now."""
    return {
        str(device): psutil.Process().memory_info().rss
        if device.type == "cpu"
        else torch.accelerator.max_memory_allocated(device)
        for device in dict.fromkeys(devices)
    }


def out_of_memory(
    error: torch.OutOfMemoryError,
    devices: Sequence[torch.device],
    kept: str,
    planned: Mapping[str, int] | None = None,
) -> UserError:
    """Say which device ran out, what the peaks were and what would need less.

    Args:
        error: torch's.
        devices: of the run.
        kept: what is not lost, in a sentence.
        planned: bytes by device, if there was a plan.
    """
    plans = {name: f" (planned {size / 2**30:.1f})" for name, size in (planned or {}).items()}
    peaks = ", ".join(
        f"{name} {size / 2**30:.1f} GiB{plans.get(name, '')}" for name, size in peak_memory(devices).items()
    )
    first_line = str(error).splitlines()[0]
    return UserError(
        f"out of memory: {first_line} Peaks so far: {peaks}. {kept} What needs less: "
        "engine.residency = 'auto' or 'offload', engine.streamed_blocks, model.quantize = 'fp8', "
        "fewer data.frames, a smaller data.resolution, "
        "another boundary (engine.split_at), one more device"
    )
