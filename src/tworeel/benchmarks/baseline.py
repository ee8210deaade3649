"""Runs what the pipeline is compared with, once for all cases that it serves."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from tworeel.benchmarks import machine, models
from tworeel.benchmarks.naive import device_hooks
from tworeel.benchmarks.preparing import (
    Gradients,
    Observer,
    Prepared,
    Settings,
    gradients_of,
    prepare,
    timed,
    unless_out_of_memory,
)
from tworeel.benchmarks.results import Naive
from tworeel.benchmarks.shapes import Case
from tworeel.engine.attention_layout import keep_gradient_layouts

NAIVE_CLIPS = 2
"""Micro-batches that are enough to time the naive run, where each takes as long as any other."""


@dataclass(frozen=True, kw_only=True)
class Baseline:
    """A naive run and what it leaves for the pipeline."""

    naive: Naive
    prepared: Prepared | None = None
    """The pipeline's model too, if that runs with the same weights in the same places."""
    gradients: Gradients | None = None


class Baselines:
    """Naive runs; cases share one unless gradients are compared with it."""

    def __init__(self, observer: Observer) -> None:
        self._observer = observer
        self._known: dict[Hashable, Naive] = {}

    def run(self, case: Case, settings: Settings, blocks: int) -> Baseline:
        """Run it unquantized, or in the case's precision where that does not fit."""
        unquantized, *others = _attempts(settings)
        found = self._attempt(case, unquantized, settings, blocks)
        for other in others:
            if found.naive.seconds_per_clip is not None:
                break
            del found  # and its model
            asked = other.precision_of(case.model)
            self._observer.say(f"  the {case.model.precision} baseline does not fit: it runs in {asked} too")
            found = self._attempt(case, other, settings, blocks)
        return found

    def _attempt(self, case: Case, attempt: Settings, settings: Settings, blocks: int) -> Baseline:
        devices, precision = attempt.devices, attempt.precision_of(case.model)
        kind = (case.model, case.grid, blocks, attempt.rank, precision)
        known = self._known.get(kind)
        if known and (known.seconds_per_clip is None or not attempt.check):
            return Baseline(naive=known)
        machine.limit_memory(devices, None)  # it takes what it needs
        machine.reset_peaks(devices)
        prepared = unless_out_of_memory(lambda: prepare(case, attempt, blocks))
        gradients = None
        if prepared is None:
            naive = Naive(seconds_per_clip=None, peaks=machine.peaks(devices), precision=precision)
        else:
            self._observer.say("  one micro-batch at a time with per-block device hooks ...")
            naive, gradients = run_naive(case, prepared, attempt, self._observer)
        machine.reset_peaks(devices)
        self._known[kind] = naive
        is_same = attempt == settings
        return Baseline(naive=naive, prepared=prepared if is_same else None, gradients=gradients)


def _attempts(settings: Settings) -> Iterator[Settings]:
    """What the naive run works with: all weights on the devices, a part of the model on each.

    Not quantized also where the pipeline's weights are; in their precision if that does not fit.
    """
    interleaved = settings.stages_per_device > 1
    split_at = None if interleaved else settings.split_at
    plain = replace(settings, streamed=None, stages_per_device=1, split_at=split_at)
    yield replace(plain, quantize=None)
    if settings.quantize is not None:
        yield plain


def run_naive(
    case: Case, prepared: Prepared, settings: Settings, observer: Observer
) -> tuple[Naive, Gradients | None]:
    """Time some micro-batches one after the other.

    Returns:
        The time; and, where they are checked, the gradients of all micro-batches of a step.
    """
    keep_gradient_layouts()
    model = prepared.model
    batches = prepared.batches if settings.check else prepared.batches[:NAIVE_CLIPS]

    def train(some: Sequence[dict[str, Any]]) -> None:
        for batch in some:
            observer.poll()
            models.mean_square(model(**batch)).backward()

    def seconds_of_all() -> float:
        with device_hooks(model, prepared.placement):
            train(batches[:1])
            return timed(prepared, lambda: train(batches))[0]

    seconds = unless_out_of_memory(seconds_of_all)
    gradients = gradients_of(model) if seconds and settings.check else None
    model.zero_grad(set_to_none=True)
    clip = seconds / len(batches) if seconds else None
    peaks = machine.peaks(settings.devices)
    precision = settings.precision_of(case.model)
    return Naive(seconds_per_clip=clip, peaks=peaks, precision=precision), gradients
