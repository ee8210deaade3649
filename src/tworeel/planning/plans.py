"""What a plan says. Data alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from math import log
from typing import Any

from tworeel.engine.residency import Residency
from tworeel.units import GIB, gibibytes

MOST_COPYING = 1.1
"""Times as long as it computes that a stage may take before its copies are what limits."""
MOST_BUBBLE = 0.2
"""Where the cards wait for a larger share of a step, that is what limits."""
NEARLY = 0.9
"""Host memory of which more is taken decides what a stage can do."""
ABOUT = 0.05
"""Shares by which what two plans lack differs if it is about the same."""


@dataclass(frozen=True, kw_only=True)
class StagePlan:
    """One stage: its blocks, what it holds and how long it works. Sizes in bytes, times in seconds."""

    device: str
    """For example `cuda:0`."""
    card: str
    first: int
    """First block, counted over all lists."""
    last: int
    kept: int
    """Blocks that keep all activations."""
    residency: Residency
    """Of the others."""
    streamed: int
    """Blocks whose weights wait in host memory."""
    in_flight: int
    """Micro-batches whose activations it holds at a time."""
    host: int = 0
    """Bytes of pinned host memory, for what is parked and streamed."""
    parts: Mapping[str, int]
    """What the peak is made of."""
    of_each: int
    """What one micro-batch in flight less would spare: its activations, and what waits for them."""
    spare: int
    """Left alone beside them: the allocator's rounding and gaps."""
    free: int
    """What its device has for all of it; its part of that, where several stages share the device."""
    context: int | None = None
    """What driver and CUDA take of the card beside that; None of a device that is here, where it is gone from
    what is free. Stages that share a device have equal parts."""
    shared: int = 1
    """Stages on its device."""
    forward: float
    """Of a micro-batch, on average over the data."""
    backward: float
    computing: float
    """Of both, what they would take without copies to host memory and back."""
    forward_kernels: int
    """That the host launches for a micro-batch's forward, with what parking takes it, in as many."""
    backward_kernels: int

    @property
    def copying(self) -> float:
        """How many times as long as it computes it takes, for copies to host memory and back."""
        return (self.forward + self.backward) / self.computing

    @property
    def num_blocks(self) -> int:
        """Blocks of the stage."""
        return self.last - self.first + 1

    @property
    def kernels(self) -> int:
        """That the host launches for a micro-batch."""
        return self.forward_kernels + self.backward_kernels

    @property
    def only_computes(self) -> bool:
        """Whether nothing of it is copied to host memory and back beside its work."""
        return not self.streamed and not (self.residency.is_parked and self.kept < self.num_blocks)

    @property
    def peak(self) -> int:
        """The most that is held at a time."""
        return sum(self.parts.values())

    @property
    def fits(self) -> bool:
        """Whether the device has room for it."""
        return self.lacking == 0

    @property
    def lacking(self) -> int:
        """Bytes that its device has too few; 0 where it fits."""
        return max(0, self.peak + self.spare - self.free)

    @property
    def shortfall(self) -> str:
        """How much it lacks where it does not fit, in words."""
        wanted = self.peak + self.spare
        most = max(self.parts, key=lambda part: self.parts[part])
        lacking = f"{_too_few(self.lacking)}, most is {most}"
        if self.shared > 1:
            lacking = f"blocks {self.first} to {self.last}{self.part_of_card}: {lacking}"
        return f"{self.device} would need {gibibytes(wanted)} and has {gibibytes(self.free)} ({lacking})"

    @property
    def part_of_card(self) -> str:
        """What is said behind its figures where it has not all of its card."""
        return "" if self.shared == 1 else f", 1/{self.shared} of the card's"


@dataclass(frozen=True, kw_only=True)
class Alternative:
    """Something else that was weighed."""

    name: str
    fits: bool
    seconds_per_step: float | None
    """None where it was clear without."""
    peaks: tuple[int, ...]
    """By stage; none where it was clear without."""
    reason: str
    """Why it is not the plan, or what it would change."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Which card does what, what it holds and how long it takes."""

    model: str
    precision: str
    """Of the frozen weights of the blocks."""
    compiled: bool
    cpp_wrapper: bool
    """Whether compiled blocks are launched from C++."""
    micro_batches: int
    """Clips of an optimizer step."""
    tokens: int
    """Of the largest clip: what memory is planned for."""
    stages: tuple[StagePlan, ...]
    host_memory: int
    """Bytes of pinned host memory."""
    host_free: int
    seconds_per_step: float
    busy: tuple[float, ...]
    """Share of a step in which each stage computes."""
    host_bound: bool
    """Whether the cards wait for the host, which launches their work."""
    steps: int
    steps_per_epoch: float
    calibrated: bool
    """Whether times rest on what was measured on these cards."""
    measured_bytes: bool = False
    """Whether what blocks take does."""
    apart: Mapping[str, int] = field(default_factory=dict)
    """Bytes by which a device's peak is less than its stages' together, which do not come at one time."""
    alternatives: tuple[Alternative, ...] = ()
    changes: tuple[Alternative, ...] = ()
    """The smallest changes with which it would fit, if it does not."""

    @property
    def fits(self) -> bool:
        """Whether it can be trained so without running out of memory."""
        return all(stage.fits for stage in self.stages) and self.host_memory <= self.host_free

    @property
    def limit(self) -> str:
        """What keeps it from fitting, or from being faster."""
        if not self.fits:
            return "; ".join(self.shortfalls)
        if self.host_bound:
            return "the host, which launches too slowly for so few tokens: larger clips"
        slowest = max(self.stages, key=lambda stage: stage.forward + stage.backward)
        if slowest.copying > MOST_COPYING:
            return (
                f"copies between {slowest.device} and host memory, with which it takes "
                f"{slowest.copying:.1f} times as long: 8-bit weights, shorter clips, a slot with more lanes"
            )
        if self.bubble > MOST_BUBBLE:
            return f"the cards wait {100 * self.bubble:.0f} % of a step{self._waits_for}"
        if any(stage.kept < stage.num_blocks for stage in self.stages):
            return "memory: blocks compute again what there is no room to keep"
        return "compute"

    @property
    def _waits_for(self) -> str:
        """Whether that is mostly where a step begins and ends, or for a card that has more to do."""
        busy = dict.fromkeys(self.devices, 0.0)
        for device, share in zip(self.devices, self.busy, strict=True):
            busy[device] += share
        busiest = max(busy, key=lambda device: busy[device])
        uneven = 1 - sum(busy.values()) / len(busy) / busy[busiest]
        if uneven < self.bubble / 2:
            return ": more micro-batches a step"
        where = "host memory" if self.host_memory > NEARLY * self.host_free else "memory on the others"
        return f" for {busiest}, which works {100 * busy[busiest]:.0f} %: more {where}"

    @property
    def shortfalls(self) -> list[str]:
        """What does not fit, and by how much; of a device's stages that of the one that lacks most."""
        most: dict[str, StagePlan] = {}
        for stage in self.stages:
            if not stage.fits:
                most[stage.device] = max(most.get(stage.device, stage), stage, key=lambda one: one.lacking)
        found = [stage.shortfall for stage in most.values()]
        if self.host_memory > self.host_free:
            wanted, free = gibibytes(self.host_memory), gibibytes(self.host_free)
            lacking = _too_few(self.host_memory - self.host_free)
            found.append(f"{wanted} of host memory would be pinned, {free} may be ({lacking})")
        return found

    @property
    def num_streamed(self) -> int:
        """Blocks whose weights wait in host memory."""
        return sum(stage.streamed for stage in self.stages)

    @property
    def devices(self) -> list[str]:
        """Of each stage."""
        return [stage.device for stage in self.stages]

    @property
    def stages_per_device(self) -> int:
        """Stages that each device has."""
        return len(self.stages) // len(set(self.devices))

    @property
    def split_at(self) -> tuple[int, ...]:
        """First block of each stage after the first."""
        return tuple(stage.first for stage in self.stages[1:])

    @property
    def peaks(self) -> dict[str, int]:
        """The most that each device holds at a time, by its name."""
        found: dict[str, int] = {}
        for stage in self.stages:
            found[stage.device] = found.get(stage.device, 0) + stage.peak
        return {device: peak - self.apart.get(device, 0) for device, peak in found.items()}

    @property
    def bubble(self) -> float:
        """Share of a step in which the cards wait, on average."""
        return max(0.0, 1 - sum(self.busy) / len(set(self.devices)))

    def as_json(self) -> dict[str, Any]:
        """As plain values."""
        return {
            **asdict(self),
            "fits": self.fits,
            "limit": self.limit,
            "split_at": self.split_at,
            "bubble": self.bubble,
            "peaks": self.peaks,
        }


def _too_few(missing: int) -> str:
    return f"{gibibytes(missing) if missing > 0.1 * GIB else f'{missing / 2**20:.0f} MiB'} too few"


def alternative_of(name: str, found: Plan, best: Plan | None = None) -> Alternative:
    """Something else that was weighed, and why it is not the plan.

    Args:
        name: what is other.
        found: the plan with it.
        best: the one that is followed; None if that does not fit.
    """
    if not found.fits:
        reason = f"does not fit: {found.shortfalls[0]}"
    elif best is None:
        reason = "fits"
    else:
        ours, theirs = (one.seconds_per_step / one.micro_batches for one in (found, best))
        reason = f"{ours / theirs:.2f} times the time of a clip"
    return Alternative(
        name=name,
        fits=found.fits,
        seconds_per_step=found.seconds_per_step,
        peaks=tuple(stage.peak for stage in found.stages),
        reason=reason,
    )


def rank(plan: Plan) -> tuple[Any, ...]:
    """Less is better: what fits, by its time, the better balanced one where the host limits all; then what is
    nearest to fitting, of those that are about as near the fastest."""
    if plan.fits:
        return 0, plan.seconds_per_step, max(plan.busy)
    missing = sum(stage.lacking for stage in plan.stages) + max(0, plan.host_memory - plan.host_free)
    return 1, round(log(missing) / ABOUT), plan.seconds_per_step
