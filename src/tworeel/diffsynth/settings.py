"""The environment variables that say how DiffSynth's transformer is split."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise

import torch

from tworeel.errors import raise_if_any

_NAME = "DIFFSYNTH_DUAL_GPU"
RESIDENCIES = ("keep", "selective", "recompute", "offload", "offload-selective")


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How the transformer is split."""

    devices: tuple[str, ...]
    """One a stage."""
    split_at: tuple[int, ...] | None = None
    """First block of each stage after the first; by the devices' memory and speed if None."""
    residency: str | None = None
    """What the blocks leave behind; what the script's checkpointing options say if None."""
    fp8: bool = False
    """Whether the blocks' frozen linear layers are kept in fp8."""


def read_settings(environment: Mapping[str, str]) -> Settings:
    """Read the variables.

    Raises:
        UserError: all that is wrong with them.
    """
    devices = _words(environment, "DEVICES") or visible_devices()
    at = _words(environment, "SPLIT_AT")
    residency = environment.get(f"{_NAME}_RESIDENCY") or None
    fp8 = environment.get(f"{_NAME}_FP8", "").strip().lower()
    problems = [*_devices_problems(devices), *_split_problems(at, len(devices))]
    problems += _processes_problems(environment)
    if residency is not None and residency not in RESIDENCIES:
        problems.append(f"{_NAME}_RESIDENCY={residency}: allowed are {', '.join(RESIDENCIES)}")
    if fp8 not in ("", "true", "false"):
        problems.append(f"{_NAME}_FP8={fp8}: allowed are true, false")
    raise_if_any(problems)
    return Settings(
        devices=tuple(devices),
        split_at=tuple(map(int, at)) or None,
        residency=residency,
        fp8=fp8 == "true",
    )


def visible_devices() -> list[str]:
    """All accelerators that this process sees, for example `cuda:0` and `cuda:1`."""
    kind = torch.accelerator.current_accelerator()
    return [] if kind is None else [f"{kind.type}:{i}" for i in range(torch.accelerator.device_count())]


def _words(environment: Mapping[str, str], name: str) -> list[str]:
    value = environment.get(f"{_NAME}_{name}", "").strip()
    return [word.strip() for word in value.split(",")] if value else []


def _devices_problems(devices: list[str]) -> Iterator[str]:
    for name in devices:
        try:
            torch.device(name)
        except RuntimeError:
            yield f"{_NAME}_DEVICES: '{name}' is no device; an example is cuda:0,cuda:1"
    if len(devices) < 2:
        found = devices[0] if devices else "none"
        yield f"{_NAME}=true needs two devices or more, found: {found}"


def _split_problems(at: list[str], num_devices: int) -> Iterator[str]:
    name = f"{_NAME}_SPLIT_AT={','.join(at)}"
    wrong = [word for word in at if not word.isdecimal()]
    if wrong:
        yield f"{name}: {', '.join(repr(word) for word in wrong)} is no whole number; an example is 20"
        return
    numbers = [int(word) for word in at]
    if numbers and num_devices >= 2 and len(numbers) != num_devices - 1:
        yield f"{name}: {num_devices} devices need {num_devices - 1} numbers, one for each but the first"
    if any(a >= b for a, b in pairwise((0, *numbers))):
        yield f"{name}: the numbers must rise, from 1 on"


def _processes_problems(environment: Mapping[str, str]) -> Iterator[str]:
    count = environment.get("WORLD_SIZE", "1")
    if count not in ("", "1"):
        yield (
            f"--num_processes {count}: one process drives all devices; start it with "
            "python -m tworeel.diffsynth, or with accelerate launch --num_processes 1"
        )
