"""Runs one case after the other: builds the model, warms up, times, compares."""

from __future__ import annotations

import statistics
import time
import traceback
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol, TypeVar

import psutil
import torch
from torch import Tensor, nn

from tworeel.benchmarks import machine, models
from tworeel.benchmarks.flops import work_of
from tworeel.benchmarks.naive import device_hooks
from tworeel.benchmarks.results import (
    Agreement,
    CaseResult,
    Measured,
    Naive,
    agreement_of,
    find_limit,
    ideal_seconds,
    mean_stage_seconds,
)
from tworeel.benchmarks.shapes import TINY, Case
from tworeel.engine import Pipeline, Placement, split
from tworeel.engine.attention import AttentionBackend, attention_backend
from tworeel.engine.split import streamed_positions
from tworeel.engine.timeline import Span, busy_shares
from tworeel.errors import UserError
from tworeel.lora.state import lora_parameters
from tworeel.training.assembly import HOST_SHARE

ALONE = 2
"""Steps of one micro-batch that tell how long a stage works for it."""
NAIVE_CLIPS = 2
"""Micro-batches that are enough to time the naive run, where each takes as long as any other."""

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
    stages_per_device: int = 1
    """How often `devices` is repeated: more than once interleaves."""
    split_at: tuple[int, ...] | None = None
    blocks: int | None = None
    """Of the model; as many as the real one has by default."""
    quantize: models.Quantization | None = None
    """fp8, int8 or nf4; bf16 by default, and fp32 for the tiny model."""
    residency: str = "auto"
    compile: bool = False
    attention: AttentionBackend = "auto"
    slack: int = 1
    streamed: tuple[int, ...] | None = None
    rank: int = 32
    rounds: int = 3
    cap_gib: float | None = None
    compare_naive: bool = False
    check: bool = False
    """Compare the gradients with the naive run's too."""

    @property
    def precision(self) -> str:
        """Of the frozen weights, in one word."""
        return self.quantize or "bf16"

    @property
    def baseline(self) -> Settings:
        """What the naive run works with: bf16 weights, all on the devices, a part of the model on each."""
        if not self.compare_naive:
            return self
        return replace(self, quantize=None, streamed=None, stages_per_device=1)

    @property
    def stages(self) -> tuple[torch.device, ...]:
        """The device of each stage."""
        return self.devices * self.stages_per_device


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """A model on its devices, and its micro-batches."""

    model: nn.Module
    placement: Placement
    batches: list[dict[str, Tensor]]


class Bench:
    """Runs one case after the other; nothing of it stays on the devices.

    Cases that differ by nothing else than micro-batches and how the pipeline is run share a naive run, unless
    gradients are compared with it, and what was compiled.

    Args:
        rates: operations a second of each device, as `machine.matmul_rates` gives them.
        observer: told what begins.
    """

    def __init__(self, rates: Mapping[str, float], observer: Observer) -> None:
        self._rates = rates
        self._observer = observer
        self._naive: dict[Hashable, Naive] = {}
        self._compiled_for: Hashable = None

    def run(self, case: Case, settings: Settings) -> CaseResult:
        """Measure one case.

        Raises:
            UserError: the model cannot be split or quantized so.
        """
        devices = settings.devices
        blocks = settings.blocks or case.model.blocks
        self._forget_compiled(case, settings)
        machine.reset_peaks(devices)
        tokens, count = f"{case.tokens:,} tokens", f"{case.micro_batches} micro-batches"
        self._observer.say(f"{case.name}: {blocks} blocks, {settings.precision}, {tokens}, {count}")
        prepared, naive, gradients = None, None, None
        if settings.compare_naive:
            prepared, naive, gradients = self._baseline(case, settings, blocks)
        machine.limit_memory(devices, settings.cap_gib)
        if prepared is None or settings.baseline != settings:
            del prepared
            machine.reset_peaks(devices)  # the baseline's weights are no part of this case's peaks
            prepared = _unless_out_of_memory(lambda: prepare(case, settings, blocks))
        measured = None
        if prepared:
            self._observer.say("  pipelined ...")
            ready = prepared
            measured = _unless_out_of_memory(
                lambda: run_pipelined(ready, settings, gradients, self._observer)
            )
        result = CaseResult(
            case=case,
            blocks=blocks,
            precision=settings.precision,
            floor_seconds=work_of(case.model, case.tokens, blocks).total / sum(self._rates.values()),
            peaks=machine.peaks(devices),
            pinned_peak=machine.pinned_memory(),
            measured=measured,
            naive=naive,
        )
        del prepared
        machine.free()
        return result

    def _forget_compiled(self, case: Case, settings: Settings) -> None:
        """Else new shapes count against a limit that the ones before have used up."""
        kind = (case.model, case.grid, settings.quantize)
        if kind != self._compiled_for:
            torch.compiler.reset()
        self._compiled_for = kind

    def _baseline(
        self, case: Case, settings: Settings, blocks: int
    ) -> tuple[Prepared | None, Naive | None, Gradients | None]:
        """The naive run's figures; with the model that it used, if it was not run before."""
        devices = settings.devices
        kind = (case.model, case.grid, blocks)
        if kind in self._naive and not settings.check:
            return None, self._naive[kind], None
        machine.limit_memory(devices, None)  # it takes what it needs
        prepared = _unless_out_of_memory(lambda: prepare(case, settings.baseline, blocks))
        if prepared is None:
            return None, None, None
        self._observer.say("  one micro-batch at a time with per-block device hooks ...")
        naive, gradients = run_naive(prepared, settings, self._observer)
        machine.reset_peaks(devices)
        self._naive[kind] = naive
        return prepared, naive, gradients


def prepare(case: Case, settings: Settings, blocks: int) -> Prepared:
    """Build the model on its devices, and the micro-batches on the first.

    Raises:
        UserError: the model cannot be split or quantized so.
    """
    dtype = torch.float32 if case.model == TINY else torch.bfloat16
    model = models.build(case.model, blocks)
    try:
        placement = models.place_model(model, settings.stages, settings.split_at)
    except ValueError as error:
        raise UserError(f"--devices, --split-at: {error}") from None
    try:
        streamed = streamed_positions(placement, settings.streamed)
    except ValueError as error:
        raise _refusal(error) from None
    models.fill(
        model,
        placement,
        dtype=dtype,
        rank=settings.rank,
        quantize=settings.quantize,
        streamed=streamed,
    )
    batches = models.make_batches(case, dtype, settings.devices[0])
    return Prepared(model=model, placement=placement, batches=batches)


def run_naive(prepared: Prepared, settings: Settings, observer: Observer) -> tuple[Naive, Gradients | None]:
    """Time some micro-batches one after the other.

    Returns:
        The time; and, where they are checked, the gradients of all micro-batches of a step.
    """
    model = prepared.model
    batches = prepared.batches if settings.check else prepared.batches[:NAIVE_CLIPS]

    def train(some: Sequence[dict[str, Tensor]]) -> None:
        for batch in some:
            observer.poll()
            models.mean_square(model(**batch)).backward()

    def timed() -> float:
        with device_hooks(model, prepared.placement):
            train(batches[:1])
            return _timed(prepared, lambda: train(batches))[0]

    seconds = _unless_out_of_memory(timed)
    gradients = gradients_of(model) if seconds and settings.check else None
    model.zero_grad(set_to_none=True)
    clip = seconds / len(batches) if seconds else None
    return Naive(seconds_per_clip=clip, peaks=machine.peaks(settings.devices)), gradients


def run_pipelined(
    prepared: Prepared, settings: Settings, naive: Gradients | None, observer: Observer
) -> Measured:
    """Time rounds of whole steps, and steps of one micro-batch each.

    Raises:
        UserError: the engine refuses the settings.
    """
    try:
        pipeline = make_pipeline(prepared, settings)
    except ValueError as error:
        raise _refusal(error) from None

    def loss(output: Any, batch: Any) -> Tensor:
        observer.poll()
        return models.mean_square(output)

    def step(batches: Sequence[Any]) -> tuple[Span, ...]:
        return pipeline.step(batches, loss, timed=True).spans

    batches = prepared.batches
    # As many as are in flight at a time: the first step compiles and chooses residencies for all that follow
    with attention_backend(settings.attention, settings.devices):
        step(batches[: len(settings.devices) + settings.slack + 1])
        alone = [span for batch in batches[:ALONE] for span in step([batch])]
        kernels = machine.kernel_share(settings.devices, lambda: step(batches[:1]))
        rounds = [_timed(prepared, lambda: step(batches)) for _ in range(settings.rounds)]
    agreement = agreement_of(gradients_of(prepared.model), naive) if naive else None
    return _summarize(pipeline, settings, rounds, alone, kernels, agreement)


def make_pipeline(prepared: Prepared, settings: Settings) -> Pipeline:
    """The pipeline that the settings describe."""
    division = split(
        prepared.model,
        settings.stages,
        at=prepared.placement.boundaries[1:-1],
        blocks=models.WAN.block_lists,
        residency=settings.residency,
        compile=settings.compile,
        streamed=settings.streamed,
        host_limit=int(HOST_SHARE * psutil.virtual_memory().available),
    )
    return Pipeline(division, slack=settings.slack)


def _refusal(error: ValueError) -> UserError:
    """What the engine refuses, in the command's words."""
    return UserError(str(error).replace("streamed=", "--streamed ", 1))


def gradients_of(model: nn.Module) -> Gradients:
    """Copy the LoRA's gradients to the CPU, by name."""
    found = {}
    for name, parameter in lora_parameters(model).items():
        assert parameter.grad is not None, f"{name} has no gradient"
        found[name] = parameter.grad.to("cpu", copy=True)
    return found


def _summarize(
    pipeline: Pipeline,
    settings: Settings,
    rounds: Sequence[tuple[float, tuple[Span, ...]]],
    alone: Sequence[Span],
    kernels: float | None,
    agreement: Agreement | None,
) -> Measured:
    stages = len(settings.stages)
    count = len({span.action.micro_batch for span in rounds[0][1]})
    seconds = statistics.median(time for time, _ in rounds)
    spans = min(rounds, key=lambda item: abs(item[0] - seconds))[1]
    busy = tuple(busy_shares(spans, stages))
    bubble = 1 - sum(busy) / len(settings.devices)
    works = mean_stage_seconds(alone, stages, min(ALONE, count))
    ideal = ideal_seconds(settings.stages, count, settings.slack, works)
    residency = pipeline.split.residency_in_words()
    forced = pipeline.split.is_auto and any(one.recomputes for one in pipeline.split.residencies)
    limit = find_limit(
        bubble=bubble,
        kernel_share=kernels,
        peaks=machine.peaks(settings.devices),
        limits=machine.memory_limits(settings.devices, settings.cap_gib),
        made_room=residency if forced else None,
    )
    return Measured(
        seconds_per_step=tuple(time for time, _ in rounds),
        seconds_per_clip=seconds / count,
        busy=busy,
        bubble=bubble,
        ideal_share=ideal / seconds,
        kernel_share=kernels,
        residency=residency,
        limit=limit,
        agreement=agreement,
        spans=spans,
    )


def _timed(prepared: Prepared, work: Callable[[], T]) -> tuple[float, T]:
    """Seconds of `work` from idle devices to idle devices, with gradients that begin at nothing."""
    devices = prepared.placement.devices
    prepared.model.zero_grad(set_to_none=True)
    machine.synchronize(devices)
    begin = time.perf_counter()
    result = work()
    machine.synchronize(devices)
    return time.perf_counter() - begin, result


def _unless_out_of_memory(work: Callable[[], T]) -> T | None:
    """The result of `work`, or None if a device is too small for it."""
    try:
        return work()
    except torch.OutOfMemoryError as error:
        # The error's frames hold tensors
        traceback.clear_frames(error.__traceback__)
    machine.free()
    return None
