"""What a case is run with: settings, and a model on its devices with its micro-batches."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor, nn

from tworeel.benchmarks import machine, models
from tworeel.benchmarks.shapes import Case
from tworeel.benchmarks.widths import ModelShape
from tworeel.engine import Placement
from tworeel.engine.attention import AttentionBackend
from tworeel.engine.compiling import TRIED_FROM_CPP, may_launch_from_cpp
from tworeel.engine.releasing import clear_frames, release_memory
from tworeel.engine.residency import one_a_block
from tworeel.engine.streamed_blocks import refuse_kept_streamed, streamed_positions
from tworeel.errors import UserError, collected
from tworeel.lora.state import lora_parameters
from tworeel.models.family import Family
from tworeel.quant import quantize_blocks

T = TypeVar("T")
Gradients = dict[str, Tensor]


class Observer(Protocol):
    """Hears what goes on."""

    def say(self, line: str) -> None:
        """Something begins."""

    def poll(self) -> None:
        """Called in each micro-batch; may raise to stop."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How the cases are run."""

    devices: tuple[torch.device, ...]
    """One a stage, once over."""
    may_reorder: bool = False
    """Whether a plan may give them the stages in another order."""
    stages_per_device: int = 1
    """How often `devices` is repeated: more than once interleaves."""
    split_at: tuple[int, ...] | None = None
    """First block of each stage after the first; a plan's choice by default, without one even shares."""
    blocks: int | None = None
    """Of the model; as many as the real one has by default."""
    quantize: models.Quantization | None = None
    """fp8, int8 or nf4; the model's own precision by default."""
    residency: str = "auto"
    compile: bool = False
    cpp_wrapper: bool = False
    exact: bool = True
    attention: AttentionBackend = "auto"
    slack: int = 1
    streamed: tuple[int, ...] | None = None
    """Blocks of each stage whose weights wait in host memory from the start; a plan's choice by default."""
    may_stream: bool | None = None
    """Whether those of more blocks may, as for `tworeel.engine.split`."""
    rank: int = 32
    rounds: int = 3
    cap_gib: float | None = None
    compare_naive: bool = False
    check: bool = False
    """Compare the gradients with the naive run's too."""

    def precision_of(self, model: ModelShape) -> str:
        """Of the frozen weights, in one word."""
        return self.quantize or model.precision

    @property
    def stages(self) -> tuple[torch.device, ...]:
        """The device of each stage."""
        return self.devices * self.stages_per_device


def launched(settings: Settings, case: Case, cpp_wrapper: bool | None) -> Settings:
    """The same, launched from C++ or not; None leaves it open."""
    if cpp_wrapper is None:
        images = case.grid[0] == 1
        cpp_wrapper = settings.compile and launches_from_cpp(
            settings.devices, settings.quantize, images=images
        )
    return replace(settings, cpp_wrapper=cpp_wrapper)


def launches_from_cpp(devices: Sequence[torch.device], quantize: str | None, *, images: bool) -> bool:
    """Whether what is measured on these devices, if it is compiled, is launched from C++ unasked.

    A run goes by its plan and its length, of which a benchmark has none: clips keep the devices busy from
    Python too.
    """
    several = len({device for device in devices if device.type != "cpu"}) > 1
    return images and several and quantize in TRIED_FROM_CPP and may_launch_from_cpp()


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """A model on its devices, and its micro-batches."""

    family: Family
    model: nn.Module
    placement: Placement
    streamed: list[int]
    """Positions of the blocks whose weights wait in host memory."""
    batches: list[dict[str, Any]]


def settings_problems(
    model: ModelShape,
    settings: Settings,
    quantizations: Iterable[models.Quantization | None],
    caps: Iterable[float | None],
) -> list[str]:
    """What does not suit the model or this machine, a line each, before a device is touched.

    Args:
        model: which is to be measured.
        settings: that all cases have.
        quantizations: of the cases.
        caps: of the cases, GiB a stage.
    """
    limited = any(cap is not None for cap in caps)
    problems = machine.cap_problems(settings.devices) if limited else []
    with collected(problems):
        _place(model, settings, settings.blocks or model.blocks)
    for kind in filter(None, dict.fromkeys(quantizations)):
        with collected(problems), naming(f"--precision {kind}"):
            quantize_blocks(nn.Module(), kind, names=())
    return problems


def _place(shape: ModelShape, settings: Settings, blocks: int) -> tuple[nn.Module, Placement, list[int]]:
    """The model on the meta device, what of it goes where, and which blocks are streamed."""
    model, family = models.build(shape, blocks), models.family_of(shape)
    with naming("--devices, --split-at"):
        placement = models.place_model(model, family, settings.stages, settings.split_at)
    with naming("--streamed"):
        streamed = streamed_positions(placement, settings.streamed)
        refuse_kept_streamed(one_a_block(settings.residency, blocks), streamed)
    return model, placement, streamed


def homes(case: Case, settings: Settings, blocks: int) -> list[torch.device]:
    """The device of each part of the model, in the order of the forward."""
    _, placement, _ = _place(case.model, settings, blocks)
    return [placement.devices[unit.stage] for unit in placement.units]


@contextmanager
def naming(options: str) -> Iterator[None]:
    """What the engine refuses inside is a mistake in these options."""
    try:
        yield
    except ValueError as error:
        raise UserError(f"{options}: {error}") from None


def prepare(case: Case, settings: Settings, blocks: int) -> Prepared:
    """Build the model on its devices, and the micro-batches on the first.

    Raises:
        UserError: the model cannot be split, streamed or quantized so.
    """
    dtype = models.dtype_of(case.model)
    family = models.family_of(case.model)
    model, placement, streamed = _place(case.model, settings, blocks)
    models.fill(
        model,
        family,
        placement,
        dtype=dtype,
        rank=settings.rank,
        quantize=settings.quantize,
        streamed=streamed,
    )
    batches = models.make_batches(case, dtype, settings.devices[0])
    return Prepared(family=family, model=model, placement=placement, streamed=streamed, batches=batches)


def gradients_of(model: nn.Module) -> Gradients:
    """Copy the LoRA's gradients to the CPU, by name."""
    found = {}
    for name, parameter in lora_parameters(model).items():
        assert parameter.grad is not None, f"{name} has no gradient"
        found[name] = parameter.grad.to("cpu", copy=True)
    return found


def timed(prepared: Prepared, work: Callable[[], T]) -> tuple[float, T]:
    """Seconds of `work` from idle devices to idle devices, with gradients that begin at nothing."""
    devices = prepared.placement.devices
    prepared.model.zero_grad(set_to_none=True)
    machine.synchronize(devices)
    begin = time.perf_counter()
    result = work()
    machine.synchronize(devices)
    return time.perf_counter() - begin, result


def unless_out_of_memory(work: Callable[[], T]) -> T | None:
    """The result of `work`, or None if a device is too small for it."""
    try:
        return work()
    except torch.OutOfMemoryError as error:
        # The error's frames hold tensors
        clear_frames(error)
    release_memory()
    return None
