"""Which attention kernel scaled_dot_product_attention runs: the fastest of the card, or a repeatable one."""

from __future__ import annotations

import itertools
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from functools import cache
from typing import Any, Literal

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from tworeel.engine.attention_layout import keep_gradient_layouts

AttentionBackend = Literal["auto", "cudnn", "flash", "efficient", "deterministic"]

_NAMED = {
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
}
_PROBE = (1, 8, 4096, 128)
"""Batch, heads, tokens and head dimension of the attention that the kernels are timed with."""
_PROBE_ROUNDS = 5


def before_first_product(name: AttentionBackend) -> None:
    """Set what the deterministic kernels need before the process's first matrix product on a GPU.

    cuBLAS reads it once (https://docs.nvidia.com/cuda/cublas, "Results Reproducibility").
    """
    if name == "deterministic":
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")


@contextmanager
def attention_backend(name: AttentionBackend, devices: Sequence[torch.device]) -> Iterator[None]:
    """Prefer one attention kernel inside; where it cannot run (masks, odd shapes), torch takes another.

    The choice is the process's, not the thread's, so unlike devices have one in common.

    Args:
        name: `auto` times what there is on each device and takes what is fastest over all. `deterministic`
            gives the same bits every time, also in the backward: flash attention's own deterministic variant
            (`before_first_product` has to come before).
        devices: of the model; on CPUs nothing is changed.
    """
    accelerators = [device for device in devices if device.type != "cpu"]
    if not accelerators:
        yield
        return
    keep_gradient_layouts()
    if name == "deterministic":
        first = [SDPBackend.FLASH_ATTENTION]
    else:
        first = [_NAMED[name]] if name in _NAMED else fastest_backends(accelerators)
    rest = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
    order = list(dict.fromkeys([*first, *rest]))
    with (
        sdpa_kernel(order, set_priority=True),
        _deterministic() if name == "deterministic" else nullcontext(),
    ):
        yield


def fastest_backends(devices: Sequence[torch.device]) -> list[SDPBackend]:
    """The kernels, in the order in which the devices together take least for a forward and backward in bf16.

    A device takes the first kernel that runs there; those that run nowhere are left out.
    """
    found = [
        _measured(device.type, torch.get_device_module(device).get_device_name(device), device.index)
        for device in devices
    ]
    kernels = [kernel for kernel in _NAMED.values() if any(kernel in seconds for seconds in found)]

    def together(order: Sequence[SDPBackend]) -> list[float]:
        # Where the first ones decide all, the later ones are in order, too
        return [sum(_first(order[begin:], seconds) for seconds in found) for begin in range(len(order))]

    best = min(itertools.permutations(kernels), key=together)
    return list(best)


def _first(order: Sequence[SDPBackend], seconds: Mapping[SDPBackend, float]) -> float:
    """What the first kernel takes that runs; nothing where none does."""
    return next((seconds[kernel] for kernel in order if kernel in seconds), 0.0)


@cache
def _measured(kind: str, _card: str, index: int) -> dict[SDPBackend, float]:
    """Seconds by kernel, of those that run on a device."""
    device = torch.device(kind, index)
    seconds = {kernel: _seconds(kernel, device) for kernel in _NAMED.values()}
    return {kernel: time for kernel, time in seconds.items() if time is not None}


def _seconds(backend: SDPBackend, device: torch.device) -> float | None:
    """How long a forward and backward take undisturbed; None if the kernel does not run there."""
    query = torch.ones(_PROBE, device=device, dtype=torch.bfloat16, requires_grad=True)
    seconds = []
    try:
        with sdpa_kernel(backend):
            for _ in range(_PROBE_ROUNDS + 1):
                torch.accelerator.synchronize(device)
                begin = time.perf_counter()
                output = scaled_dot_product_attention(query, query, query)
                torch.autograd.grad(output, query, output)
                torch.accelerator.synchronize(device)
                seconds.append(time.perf_counter() - begin)
    except RuntimeError:
        return None
    return min(seconds[1:])  # the first one makes plans


@contextmanager
def _deterministic() -> Iterator[None]:
    """Ask every operation for its deterministic variant; those that have none raise."""
    before = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
    )
    settings: Any = torch.utils.deterministic
    filling = settings.fill_uninitialized_memory
    # With `warn_only` flash attention warns, and takes its other variant.
    torch.use_deterministic_algorithms(True)
    # What would be filled is going to be written anyway, and filling costs a pass over every tensor.
    settings.fill_uninitialized_memory = False
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        settings.fill_uninitialized_memory = filling
