"""Runs what the pipeline is compared with, once for all cases that it serves."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
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
    homes,
    prepare,
    timed,
    unless_out_of_memory,
)
from tworeel.benchmarks.results import Naive
from tworeel.benchmarks.shapes import Case

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

    def run(self, case: Case, settings: Settings, blocks: int, *, may_be_even: bool) -> Baseline:
        """Run it unquantized, or in the case's precision where that does not fit.

        Args:
            case: what is run.
            settings: of the pipeline.
            blocks: of the model.
            may_be_even: the boundaries are a plan's, if there are any: even shares do where they do not fit.
        """
        unquantized, *others = [
            _placements(replace(settings, quantize=kind), may_be_even)
            for kind in dict.fromkeys((None, settings.quantize))
        ]
        found = self._in_precision(case, unquantized, settings, blocks)
        for other in others:
            if found.naive.seconds_per_clip is not None:
                break
            del found  # and its model
            asked = settings.precision_of(case.model)
            self._observer.say(f"  the {case.model.precision} baseline does not fit: it runs in {asked} too")
            found = self._in_precision(case, other, settings, blocks)
        return found

    def _in_precision(
        self, case: Case, attempts: Sequence[Settings], settings: Settings, blocks: int
    ) -> Baseline:
        """Run it with the weights in the first places where it fits."""
        first, *others = attempts
        kind = (case.model, case.grid, blocks, first.rank, first.precision_of(case.model))
        known = self._known.get(kind)
        if known and (known.seconds_per_clip is None or not first.check):
            return Baseline(naive=known)
        found = self._attempt(case, first, settings, blocks)
        for other in others:
            if found.naive.seconds_per_clip is not None:
                break
            del found  # and its model
            self._observer.say("  the baseline does not fit the plan's shares: it has even ones")
            found = self._attempt(case, other, settings, blocks)
        self._known[kind] = found.naive
        return found

    def _attempt(self, case: Case, attempt: Settings, settings: Settings, blocks: int) -> Baseline:
        # Random weights are those of the device that they are drawn on.
        if attempt.check and homes(case, attempt, blocks) != homes(case, settings, blocks):
            self._observer.say("  gradients are not compared: the baseline has its blocks in other places")
            attempt = replace(attempt, check=False)
        devices, precision = attempt.devices, attempt.precision_of(case.model)
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
        is_same = attempt == settings
        return Baseline(naive=naive, prepared=prepared if is_same else None, gradients=gradients)


def _placements(settings: Settings, may_be_even: bool) -> list[Settings]:
    """All weights on the devices, a part of the model on each: as the pipeline has them, and in even shares.

    Boundaries of a plan that streams are not for devices that hold all weights, but gradients are compared
    only where blocks are in the same places.
    """
    plain = replace(settings, streamed=None, may_stream=None, stages_per_device=1)
    even = replace(plain, split_at=None)
    if settings.stages_per_device > 1:
        return [even]
    if not may_be_even:
        return [plain]
    return [even] if settings.streamed and not settings.check else list(dict.fromkeys((plain, even)))


def run_naive(
    case: Case, prepared: Prepared, settings: Settings, observer: Observer
) -> tuple[Naive, Gradients | None]:
    """Time some micro-batches one after the other.

    Returns:
        The time; and, where they are checked, the gradients of all micro-batches of a step.
    """
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
