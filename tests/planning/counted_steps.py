"""Bytes that a step of a real-size model holds on each device, counted on tensors without data."""

from __future__ import annotations

import sys
import threading
import weakref
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode

from fake_tensors import make_fake
from tworeel.engine import Pipeline, parking, pipeline, split
from tworeel.engine import residency as residency_
from tworeel.engine.schedule import Action
from tworeel.engine.streams import Arrival
from tworeel.lora.inject import inject_lora
from tworeel.planning.requests import Request
from tworeel.planning.watching import Watch, fused_norms


class _ByDevice(Watch):
    """Each thread has one, and all count into the same numbers of bytes by device."""

    def __init__(self, held: Counter[str], peaks: Counter[str], known: set[int]) -> None:
        super().__init__()
        self._held, self._peaks, self._known = held, peaks, known

    def _follow(self, tensor: Tensor) -> None:
        storage, device = tensor.untyped_storage(), str(tensor.device)
        key, size = storage._cdata, storage.nbytes()
        if key in self._known:
            return
        self._known.add(key)
        self._held[device] += size
        self._peaks[device] = max(self._peaks[device], self._held[device])
        weakref.finalize(storage, self._let_go, key, device, size)

    def _let_go(self, key: int, device: str, size: int) -> None:
        self._known.discard(key)
        self._held[device] -= size


class _OneAtATime:
    """Lets one micro-batch work at a time: fake tensors are not made for threads."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self._lock = threading.RLock()
        carrier = pipeline._Carrier
        self._enter, self._leave = carrier.enter, carrier.leave
        monkeypatch.setattr(carrier, "enter", lambda carrier, action: self.enter(carrier, action))
        monkeypatch.setattr(carrier, "leave", lambda carrier: self.leave(carrier))

    def enter(self, carrier: Any, action: Action) -> None:
        """Where the turnstile lets it."""
        self._enter(carrier, action)
        self._lock.acquire()

    def leave(self, carrier: Any) -> None:
        """After the last action the loss is still to be handed out: `end` comes later."""
        if carrier._action != Action("B", carrier.number, 0):
            self._lock.release()
        self._leave(carrier)

    def end(self) -> None:
        """The micro-batch is through."""
        self._lock.release()


def counted_peaks(request: Request, residency: str, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The most bytes that the request's step makes on each device: no weights; not compiled."""
    family, trace = request.family, request.trace
    num_stages = len(request.budgets) * request.stages_per_device
    model = family.build_transformer(request.source.transformer)
    inject_lora(
        model, rank=trace.rank, alpha=trace.rank, targets=trace.targets, block_lists=family.block_lists
    )
    # Weights come below. `tworeel.engine.split` is the function, too.
    monkeypatch.setattr(sys.modules["tworeel.engine.split"], "move", lambda *_: None)
    blocks, at = family.block_lists, request.split_at
    division = split(model, ["cpu"] * num_stages, at=at, blocks=blocks, residency=residency)
    numbers = list(range(1, len(request.budgets) + 1)) * request.stages_per_device
    devices = tuple(torch.device(f"cpu:{number}") for number in numbers)
    object.__setattr__(division.placement, "devices", devices)
    fakes, held, peaks, known = FakeTensorMode(), Counter[str](), Counter[str](), set[int]()
    carry, turns = pipeline._Step.carry, _OneAtATime(monkeypatch)

    def counted(*args: Any) -> Any:
        with fakes, _ByDevice(held, peaks, known):
            try:
                return carry(*args)
            finally:
                turns.end()

    monkeypatch.setattr(pipeline._Step, "carry", counted)
    for user in (parking, residency_):
        # Without data there are no addresses.
        monkeypatch.setattr(user, "storage_of", lambda tensor: tensor.untyped_storage()._cdata)
    monkeypatch.setattr(parking, "copy_in", _come_back)

    def dtype_of(name: str, tensor: Tensor) -> torch.dtype:
        precise = tensor.requires_grad or {*name.split(".")} & {*family.keep_fp32}
        return torch.bfloat16 if isinstance(tensor, nn.Parameter) and not precise else tensor.dtype

    make_fake(model, division.placement.device_of, fakes, dtype_of)
    with fakes:
        batches = list(_micro_batches(request, devices[0]))
    with fused_norms(model):
        step = Pipeline(division, slack=request.slack).step
        step(batches, lambda output, _: output.sample.float().square().mean())
    return [peaks[str(device)] for device in dict.fromkeys(devices)]


def _come_back(host: Tensor, device: torch.device, _ready: torch.Event | None) -> Arrival:
    """From host memory to a device that only stands for one."""
    return Arrival(torch.empty_like(host, device=device))


def _micro_batches(request: Request, device: torch.device) -> Iterator[dict[str, Any]]:
    family, source = request.family, request.source
    (bucket,) = request.buckets
    shapes = family.cached_shapes(source, bucket.frames, bucket.height, bucket.width)
    for _ in range(request.micro_batches):
        cached = {name: torch.empty(shape) for name, shape in shapes.items()}
        noise = torch.empty(shapes["latents"])
        sample = family.make_sample(source.traits, cached, noise, 0.9, dtype=request.trace.dtype)
        yield {
            name: torch.empty(value.shape, dtype=value.dtype, device=device)
            if isinstance(value, Tensor)
            else value
            for name, value in sample.inputs.items()
        }
