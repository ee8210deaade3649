"""What the measuring of a case gives."""

from __future__ import annotations

import dataclasses
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from tworeel.benchmarks.machine import Peak
from tworeel.benchmarks.preparing import Settings
from tworeel.benchmarks.shapes import Case
from tworeel.engine.schedule import make_orders
from tworeel.engine.timeline import Span
from tworeel.planning.timing import simulate

LEAST_KERNEL_SHARE = 0.6
"""Below it the host limits."""
FULL = 0.95
"""Share of a device's memory above which memory limits."""
MOST_BUBBLE = 0.2
CLOSE = 0.9999
"""A cosine from which two gradients count as the same direction."""
LESS_MEMORY = "a lower --precision, --residency offload, more devices"

LimitedBy = Literal["compute", "bubble", "memory", "host"]


@dataclass(frozen=True, kw_only=True)
class Limit:
    """What keeps a case from being faster, and what that is seen by."""

    by: LimitedBy
    words: str


@dataclass(frozen=True, kw_only=True)
class Agreement:
    """How alike the gradients of two ways to run the same step are."""

    cosine: float
    """Of all of the LoRA's tensors as one vector; 1 is the same direction."""
    close: float
    """Share of the tensors with a cosine of at least `CLOSE`."""
    worst_cosine: float
    """Over the LoRA's tensors."""
    worst_tensor: str

    @property
    def in_words(self) -> str:
        """In one line."""
        close = f"{100 * self.close:.0f} % of the tensors at least {CLOSE:g}"
        worst = f"{self.worst_cosine:.6f} at worst ({self.worst_tensor})"
        return f"cosine {self.cosine:.6f} in all, {close}, {worst}"


@dataclass(frozen=True, kw_only=True)
class Planned:
    """What the plan that was followed says beforehand, without an optimizer, which no step has here."""

    fits: bool
    """With the room that a run's optimizer takes."""
    limit: str
    """What keeps it from fitting, or from being faster."""
    devices: tuple[str, ...]
    """Of each stage."""
    split_at: tuple[int, ...]
    """First block of each stage after the first."""
    streamed: tuple[int, ...]
    """Blocks of each stage whose weights wait in host memory."""
    seconds_per_clip: float
    peaks: Mapping[str, int]
    """Bytes in tensors by device."""
    host_memory: int
    """Bytes of pinned host memory."""
    calibrated: bool
    """Whether times rest on what was measured on these cards."""


@dataclass(frozen=True, kw_only=True)
class Naive:
    """One micro-batch at a time with per-block device hooks."""

    seconds_per_clip: float | None
    """Median over the rounds; None if it does not fit."""
    peaks: Mapping[str, Peak]
    precision: str = "bf16"
    """Of the frozen weights: the model's own if that fits."""


@dataclass(frozen=True)
class StageSeconds:
    """What a stage works for one micro-batch."""

    forward: float
    backward: float


@dataclass(frozen=True, kw_only=True)
class Measured:
    """Steps of a pipeline. P stages, M micro-batches.

    `busy` is the time in which a stage had work over the time of the step; `bubble` is 1 - the mean over the
    devices of the share in which any of their stages had, each stage on a CPU counting as a device.

    `ideal_share` is t_ideal / t_step; t_ideal is what `ideal_seconds` gives for the mean times of the stages'
    forwards and backwards in steps of one micro-batch with the same settings, t_step is the median. It is
    below 1 for what crossings, jitter and launching cost while the stages run side by side.
    """

    seconds_per_step: tuple[float, ...]
    """Of each round."""
    seconds_per_clip: float
    """Median over the rounds."""
    busy: tuple[float, ...]
    """By stage, of the round with the median time."""
    bubble: float
    ideal_share: float
    kernel_share: float | None
    """Of a step of one micro-batch: the share in which some device ran a kernel; None if it is not known."""
    residency: str
    """What the blocks left behind."""
    limit: Limit
    agreement: Agreement | None
    """With the naive run's gradients, if it was compared."""
    spans: tuple[Span, ...] = field(repr=False)
    """Who computed what, when, in the round with the median time."""


@dataclass(frozen=True, kw_only=True)
class CaseResult:
    """What one case gave."""

    case: Case
    blocks: int
    precision: str
    """Of the frozen weights."""
    cap_gib: float | None = None
    """What each stage may use; None for all that the devices have."""
    floor_seconds: float
    """Operations of a clip over the sum of the devices' bf16 matmul rates: no schedule is faster in bf16."""
    peaks: Mapping[str, Peak]
    pinned_peak: int
    """Bytes of pinned host memory."""
    measured: Measured | None
    """None if it does not fit."""
    naive: Naive | None
    """None if it was not compared."""
    settings: Settings
    """That it was run with: what a plan has decided is in them."""
    planned: Planned | None = None
    """None without a plan."""

    @property
    def label(self) -> str:
        """What tells the case from others of the same command."""
        cap = "" if self.cap_gib is None else f", {self.cap_gib:g} GiB"
        return f"{self.case.name}, {self.case.micro_batches} a step, {self.precision}{cap}"

    @property
    def speedup(self) -> float | None:
        """Seconds a clip of the naive run over those of the pipeline, if there are both."""
        if self.measured is None or self.naive is None or self.naive.seconds_per_clip is None:
            return None
        return self.naive.seconds_per_clip / self.measured.seconds_per_clip

    def as_json(self) -> dict[str, Any]:
        """All but the spans, as plain values."""
        found = dataclasses.asdict(self)
        if self.measured is not None:
            del found["measured"]["spans"]
        return {
            **found,
            "tokens": self.case.tokens,
            "speedup": self.speedup,
            "fits": self.measured is not None,
        }


def agreement_of(ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> Agreement:
    """Compare gradients by the cosine of each pair and of all as one vector.

    Args:
        ours: gradients by name, any shape, on the CPU.
        theirs: of the same names and shapes.
    """
    assert set(ours) == set(theirs)
    cosines = {name: _cosine(ours[name], theirs[name]) for name in ours}
    worst = min(cosines, key=lambda name: cosines[name])
    together = (torch.cat([gradients[name].flatten() for name in ours]) for gradients in (ours, theirs))
    return Agreement(
        cosine=_cosine(*together),
        close=sum(cosine >= CLOSE for cosine in cosines.values()) / len(cosines),
        worst_cosine=cosines[worst],
        worst_tensor=worst,
    )


def _cosine(one: Tensor, other: Tensor) -> float:
    return float(torch.cosine_similarity(one.double().flatten(), other.double().flatten(), dim=0))


def find_limit(
    *,
    bubble: float,
    kernel_share: float | None,
    peaks: Mapping[str, Peak],
    limits: Mapping[str, int],
    made_room: str | None,
) -> Limit:
    """Say what limits a case; the first of these that holds.

    - host: of a micro-batch that is alone, the devices run kernels less than 60 % of the time;
    - memory: a device is filled to more than 95 %, or had no room to keep all activations;
    - bubble: the stages wait for more than 20 % of the step;
    - compute: nothing of this.

    Args:
        bubble: share of the step in which the stages wait, on average.
        kernel_share: see `Measured`.
        peaks: by device.
        limits: bytes that each device may hold.
        made_room: the residency that `auto` had to choose, if it was another than to keep everything.
    """
    if kernel_share is not None and kernel_share < LEAST_KERNEL_SHARE:
        busy = f"the devices run kernels only {100 * kernel_share:.0f} % of a micro-batch's time"
        return Limit(by="host", words=f"{busy}, the host launches too slowly: --compile, or larger shapes")
    for device, peak in peaks.items():
        if peak.reserved > FULL * limits[device]:
            share = 100 * peak.reserved / limits[device]
            return Limit(by="memory", words=f"{device} is filled to {share:.0f} %: {LESS_MEMORY}")
    if made_room is not None:
        return Limit(by="memory", words=f"'{made_room}' made room, which costs time: {LESS_MEMORY}")
    if bubble > MOST_BUBBLE:
        waits = f"the stages wait {100 * bubble:.0f} % of the step"
        return Limit(by="bubble", words=f"{waits}: more --micro-batches, another --split-at, more --slack")
    return Limit(by="compute", words=f"the devices compute {100 * (1 - bubble):.0f} % of the step")


def ideal_seconds(
    devices: Sequence[Hashable], num_micro_batches: int, slack: int, stages: Sequence[StageSeconds]
) -> float:
    """The time of a step in which nothing waits for anything but its input, and crossings take no time.

    The schedule is played through. With equal stages that is M + P - 1 times what a stage works for a
    micro-batch (https://arxiv.org/abs/2006.09503, section 2.2).

    Args:
        devices: of each stage.
        num_micro_batches: M.
        slack: as the pipeline had it.
        stages: what each works for a micro-batch.
    """
    orders = make_orders(devices, num_micro_batches, slack=slack)
    return simulate(orders, [s.forward for s in stages], [s.backward for s in stages]).seconds


def mean_stage_seconds(spans: Sequence[Span], num_stages: int, steps: int) -> list[StageSeconds]:
    """What each stage works for one micro-batch, from the spans of `steps` steps of one each."""

    def mean(kind: str, stage: int) -> float:
        chosen = [span for span in spans if span.action.stage == stage and span.action.kind == kind]
        return sum(span.end - span.start for span in chosen) / steps

    return [StageSeconds(mean("F", stage), mean("B", stage)) for stage in range(num_stages)]
