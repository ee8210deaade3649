"""Runs one case after the other: builds the model, warms up, times, compares."""

from __future__ import annotations

import statistics
from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from tworeel.benchmarks import machine, models
from tworeel.benchmarks.baseline import Baseline, Baselines
from tworeel.benchmarks.flops import work_of
from tworeel.benchmarks.planned import Plans
from tworeel.benchmarks.preparing import (
    Gradients,
    Observer,
    Prepared,
    Settings,
    gradients_of,
    naming,
    prepare,
    timed,
    unless_out_of_memory,
)
from tworeel.benchmarks.results import (
    Agreement,
    CaseResult,
    Measured,
    agreement_of,
    find_limit,
    ideal_seconds,
    mean_stage_seconds,
)
from tworeel.benchmarks.shapes import Case
from tworeel.config.schema import TrainConfig
from tworeel.engine import Pipeline, split
from tworeel.engine.attention import attention_backend
from tworeel.engine.releasing import release_memory
from tworeel.engine.timeline import Span, busy_shares, device_shares
from tworeel.training.assembly import host_limit, keep_compiled

ALONE = 2
"""Steps of one micro-batch that tell how long a stage works for it."""


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
        self._plans = Plans(observer)
        self._baselines = Baselines(observer)
        self._compiled_for: Hashable = None

    def run(self, case: Case, settings: Settings) -> CaseResult:
        """Measure one case, with what a plan decides of what the settings leave open.

        Raises:
            UserError: the model cannot be split, streamed or quantized so.
        """
        precision, undivided = settings.precision_of(case.model), settings.split_at is None
        blocks = settings.blocks or case.model.blocks
        self._forget_compiled(case, settings)
        tokens, count = f"{case.tokens:,} tokens", f"{case.micro_batches} micro-batches"
        self._observer.say(f"{case.name}: {blocks} blocks, {precision}, {tokens}, {count}")
        settings, planned = self._plans.follow(case, settings, blocks)
        baseline = None
        if settings.compare_naive:
            baseline = self._baselines.run(case, settings, blocks, may_be_even=undivided)
        measured = self._pipelined(case, settings, blocks, baseline)
        result = CaseResult(
            case=case,
            blocks=blocks,
            precision=precision,
            cap_gib=settings.cap_gib,
            floor_seconds=work_of(case.model, case.tokens, blocks).total / sum(self._rates.values()),
            peaks=machine.peaks(settings.devices),
            pinned_peak=machine.pinned_memory(),
            measured=measured,
            naive=baseline.naive if baseline else None,
            settings=settings,
            planned=planned,
        )
        del baseline
        release_memory()
        return result

    def _pipelined(
        self, case: Case, settings: Settings, blocks: int, baseline: Baseline | None
    ) -> Measured | None:
        """Measure the pipeline, on the baseline's model if there is that; None if it does not fit."""
        machine.limit_memory(settings.devices, settings.cap_gib)
        prepared = baseline.prepared if baseline else None
        if prepared is None:
            machine.reset_peaks(settings.devices)  # what is over is no part of this case's peaks
            prepared = unless_out_of_memory(lambda: prepare(case, settings, blocks))
        if prepared is None:
            return None
        self._observer.say("  pipelined ...")
        ready, gradients = prepared, baseline.gradients if baseline else None
        return unless_out_of_memory(lambda: run_pipelined(ready, settings, gradients, self._observer))

    def _forget_compiled(self, case: Case, settings: Settings) -> None:
        """Else new shapes count against a limit that the ones before have used up."""
        kind = (case.model, case.grid, settings.quantize)
        if kind != self._compiled_for:
            torch.compiler.reset()
        self._compiled_for = kind


def run_pipelined(
    prepared: Prepared, settings: Settings, naive: Gradients | None, observer: Observer
) -> Measured:
    """Time rounds of whole steps, and steps of one micro-batch each."""
    pipeline = make_pipeline(prepared, settings)

    def loss(output: Any, batch: Any) -> Tensor:
        observer.poll()
        return models.mean_square(output)

    def step(batches: Sequence[Any]) -> tuple[Span, ...]:
        return pipeline.step(batches, loss, timed=True).spans

    batches = prepared.batches
    # As many as are in flight at a time: the first step compiles and chooses residencies for all that follow,
    # in the second they overlap from the beginning and take the memory that they need.
    with attention_backend(settings.attention, settings.devices):
        for _ in range(2):
            step(batches[: len(settings.stages) + settings.slack + 1])
        alone = [span for batch in batches[:ALONE] for span in step([batch])]
        kernels = machine.kernel_share(settings.devices, lambda: step(batches[:1]))
        rounds = [timed(prepared, lambda: step(batches)) for _ in range(settings.rounds)]
    agreement = agreement_of(gradients_of(prepared.model), naive) if naive else None
    return _summarize(pipeline, settings, rounds, alone, kernels, agreement)


def make_pipeline(prepared: Prepared, settings: Settings) -> Pipeline:
    """The pipeline that the settings describe.

    Raises:
        UserError: there is too little host memory for the weights that are streamed.
    """
    if settings.compile:
        keep_compiled(TrainConfig().output.parent / "cache")  # that of a run from here, by default
    with naming("--streamed"):
        division = split(
            prepared.model,
            settings.stages,
            at=prepared.placement.boundaries[1:-1],
            blocks=prepared.family.block_lists,
            residency=settings.residency,
            compile=settings.compile,
            cpp_wrapper=settings.cpp_wrapper,
            exact=settings.exact,
            streamed=settings.streamed,
            may_stream=settings.may_stream,
            host_limit=host_limit(prepared.model, prepared.placement, prepared.streamed),
        )
    return Pipeline(division, slack=settings.slack)


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
    bubble = 1 - statistics.fmean(device_shares(spans, settings.stages))
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
