"""The environment variables that say how DiffSynth's transformer is split."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise

import torch

from tworeel.errors import did_you_mean, raise_if_any

_NAME = "DIFFSYNTH_DUAL_GPU"
_VARIABLES = tuple(f"{_NAME}_{word}" for word in ("SPLIT_AT", "DEVICES", "RESIDENCY", "FP8", "TEXT_ENCODER"))
_TRUE = ("y", "yes", "t", "true", "on", "1")
"""What accelerate takes for true."""
RESIDENCIES = ("keep", "selective", "recompute", "offload", "offload-selective")
TEXT_ENCODER_HOMES = ("device", "host")


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
    text_encoder: str | None = None
    """Where its weights stay while it is not used; where there is room for them if None."""


def device_name(device: torch.device) -> str:
    """`cuda:0` also for `cuda`, which is the same."""
    return device.type if device.type == "cpu" else f"{device.type}:{device.index or 0}"


def read_settings(environment: Mapping[str, str]) -> Settings:
    """Read the variables.

    Raises:
        UserError: all that is wrong with them.
    """
    devices = _words(environment, "DEVICES") or visible_devices()
    at = _words(environment, "SPLIT_AT")
    residency = environment.get(f"{_NAME}_RESIDENCY") or None
    fp8 = environment.get(f"{_NAME}_FP8", "").strip().lower()
    text_encoder = environment.get(f"{_NAME}_TEXT_ENCODER") or None
    problems = [*_names_problems(environment), *_devices_problems(devices, environment)]
    problems += [*_split_problems(at, len(devices)), *_accelerate_problems(environment)]
    if residency is not None and residency not in RESIDENCIES:
        problems.append(f"{_NAME}_RESIDENCY={residency}: allowed are {', '.join(RESIDENCIES)}")
    if fp8 not in ("", "true", "false"):
        problems.append(f"{_NAME}_FP8={fp8}: allowed are true, false")
    if text_encoder is not None and text_encoder not in TEXT_ENCODER_HOMES:
        allowed = ", ".join(TEXT_ENCODER_HOMES)
        problems.append(f"{_NAME}_TEXT_ENCODER={text_encoder}: allowed are {allowed}")
    raise_if_any(problems)
    return Settings(
        devices=tuple(device_name(torch.device(name)) for name in devices),
        split_at=tuple(map(int, at)) or None,
        residency=residency,
        fp8=fp8 == "true",
        text_encoder=text_encoder,
    )


def visible_devices() -> list[str]:
    """All accelerators that this process sees, for example `cuda:0` and `cuda:1`."""
    kind = torch.accelerator.current_accelerator()
    return [] if kind is None else [f"{kind.type}:{i}" for i in range(torch.accelerator.device_count())]


def _words(environment: Mapping[str, str], name: str) -> list[str]:
    value = environment.get(f"{_NAME}_{name}", "").strip()
    return [word.strip() for word in value.split(",")] if value else []


def _names_problems(environment: Mapping[str, str]) -> Iterator[str]:
    for name in environment:
        if name.startswith(f"{_NAME}_") and name not in _VARIABLES:
            allowed = f"{did_you_mean(name, _VARIABLES)}; there are {', '.join(_VARIABLES)}"
            yield f"{name}: there is no such variable{allowed}"


def _devices_problems(devices: list[str], environment: Mapping[str, str]) -> Iterator[str]:
    present = [*visible_devices(), "cpu"]
    wrong = [problem for name in devices for problem in _device_problems(name, present)]
    yield from (f"{_NAME}_DEVICES: {problem}" for problem in wrong)
    if len(devices) < 2:
        found = devices[0] if devices else "none"
        yield f"{_NAME}=true needs two devices or more, found: {found}"
    elif problems := list(_accelerate_device_problems(environment, present)):
        yield from problems
    elif not wrong:
        here = _device_of_accelerate(environment, present)
        if device_name(torch.device(devices[0])) != here:
            yield f"{_NAME}_DEVICES: accelerate computes on {here}, so that has to be the first device"


def _device_problems(name: str, present: list[str]) -> Iterator[str]:
    try:
        device = torch.device(name)
    except RuntimeError:
        yield f"'{name}' is no device; an example is cuda:0,cuda:1"
        return
    if device_name(device) not in present:
        yield f"there is no {name} here; there are {', '.join(present)}"


def _accelerate_device_problems(environment: Mapping[str, str], present: list[str]) -> Iterator[str]:
    if given := environment.get("ACCELERATE_TORCH_DEVICE"):
        yield from (f"ACCELERATE_TORCH_DEVICE: {problem}" for problem in _device_problems(given, present))


def _device_of_accelerate(environment: Mapping[str, str], present: list[str]) -> str:
    """The device that accelerate will choose in a single process, by the variables that it reads."""
    given = environment.get("ACCELERATE_TORCH_DEVICE")
    if given:
        return device_name(torch.device(given))
    return "cpu" if environment.get("ACCELERATE_USE_CPU", "").lower() in _TRUE else present[0]


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


def _accelerate_problems(environment: Mapping[str, str]) -> Iterator[str]:
    count = environment.get("WORLD_SIZE", "1")
    if count not in ("", "1"):
        yield (
            f"--num_processes {count}: one process drives all devices; start it with "
            "python -m tworeel.diffsynth, or with accelerate launch --num_processes 1"
        )
    compiler = environment.get("ACCELERATE_DYNAMO_BACKEND", "").lower()
    if compiler not in ("", "no"):
        yield f"ACCELERATE_DYNAMO_BACKEND={compiler}: accelerate cannot compile what is split; allowed is no"
    for name in ("DEEPSPEED", "FSDP", "MEGATRON_LM"):
        variable = f"ACCELERATE_USE_{name}"
        if environment.get(variable, "").lower() in _TRUE:
            yield f"{variable}=true: one process drives all devices, and the model is its own; unset it"
