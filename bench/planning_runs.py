"""Plans a case and runs it: what `planning.py` compares."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from statistics import fmean
from typing import Any

import torch
from at_peak import watched
from planning_cases import Case

from tworeel.benchmarks import machine, models
from tworeel.benchmarks.planned import Planners, make_request
from tworeel.benchmarks.preparing import Settings, launches_from_cpp, unless_out_of_memory
from tworeel.engine import Pipeline, place, split
from tworeel.engine.attention import attention_backend
from tworeel.engine.releasing import release_memory
from tworeel.engine.streamed_blocks import streamed_positions
from tworeel.lora.state import lora_parameters
from tworeel.models.family import Family
from tworeel.planning.budgets import Budget
from tworeel.planning.cards import known_cards, parse_cards
from tworeel.planning.changing import scaled
from tworeel.planning.devices import budgets_of_devices
from tworeel.planning.measuring import Stopwatch
from tworeel.planning.planner import Planner
from tworeel.planning.plans import Plan
from tworeel.planning.requests import Request
from tworeel.training.planned import UNMEASURED, budgets_of_cards
from tworeel.units import GIB

MOST_FRAMES = 1001
"""Longer clips are not looked for."""


@dataclass(frozen=True, kw_only=True)
class Measured:
    """What some steps took; sizes in bytes."""

    seconds: float | None
    """Of a step; None if a device ran out of memory."""
    peaks: dict[str, int]
    """In tensors by accelerator, also where it ran out."""
    reserved: dict[str, int]
    """Held by torch's allocator."""
    settled: dict[str, int] = field(default_factory=dict)
    """Peaks after the first step, which compiles and measures; none if there was but one."""
    residency: str = ""
    """What the blocks left behind, in words."""
    at_peak: dict[str, list[str]] = field(default_factory=dict)
    """What lay in each device's memory then, if that was asked for."""


class Bench:
    """Devices, and what was found out on them: each clip is traced and each card timed once.

    Args:
        devices: of the stages; a case takes the first ones.
        looks: note what lies in memory at the peak; steps take longer then.
        again: whether a case that the host limits is planned and run once more.
    """

    def __init__(self, devices: Sequence[torch.device], *, looks: bool = False, again: bool = False) -> None:
        self.devices = tuple(devices)
        self.again = again
        self._looks = looks
        self._planners = Planners()
        self._stopwatch = Stopwatch()
        self._compiled_for: tuple[Any, ...] = ()

    def planner(self, case: Case, *, host_factor: float = 1.0) -> Planner:
        """Plans a case for its devices as they are now, limited as the case says.

        Args:
            case: what is planned.
            host_factor: how many times as long as by its small launches the host takes.
        """
        devices = self.devices[: case.stages]
        _limit(case, devices)
        settings = _settings(case, devices)
        budgets = [
            replace(budget, launching=host_factor * (budget.launching or 1.0))
            for budget in self._budgets(case, devices)
        ]
        request = make_request(case.source, case.bucket, settings, budgets, micro_batches=case.micro_batches)
        return self._planners.planner(request)

    def longest(self, case: Case) -> tuple[Case, Case | None] | None:
        """The longest clip that is accepted, and the next longer one; None if not even an image is.

        A trace takes seconds, so a clip's is scaled to find about where the edge is.
        """
        stride = case.source.traits.temporal_stride
        middle = replace(case, frames=20 * stride + 1)
        known = self.planner(middle)

        def about(frames: int) -> bool:
            share = (frames - 1 + stride) / (middle.frames - 1 + stride)
            bucket = replace(middle.bucket, frames=frames)
            request = replace(known.request, buckets={bucket: 1.0})
            return Planner(request, scaled(known.trace, share), known).best().fits

        frames = 1
        while frames + stride <= MOST_FRAMES and about(frames + stride):
            frames += stride
        while frames >= 1 and not self.planner(replace(case, frames=frames)).best().fits:
            frames -= stride
        while 1 <= frames <= MOST_FRAMES:
            longer = replace(case, frames=frames + stride)
            if not self.planner(longer).best().fits:
                return replace(case, frames=frames), longer
            frames += stride
        return None if frames < 1 else (replace(case, frames=frames), None)

    def run(self, case: Case, request: Request, plan: Plan) -> Measured:
        """Train the case's steps with the plan's boundaries, in memory that nothing else has a part of."""
        devices = self.devices[: case.stages]
        self._forget_compiled(case)
        with watched(devices) if self._looks else nullcontext({}) as at_peak:
            done = unless_out_of_memory(lambda: _train(case, request, devices, plan))
        found = machine.peaks(devices)
        release_memory()
        peaks = {name: peak.allocated for name, peak in found.items()}
        reserved = {name: peak.reserved for name, peak in found.items()}
        if done is None:
            return Measured(seconds=None, peaks=peaks, reserved=reserved, at_peak=at_peak)
        return Measured(
            seconds=done.seconds,
            peaks={name: max(peak, done.first[name].allocated) for name, peak in peaks.items()},
            reserved={name: max(size, done.first[name].reserved) for name, size in reserved.items()},
            settled=peaks if case.steps > 1 else {},
            residency=done.residency,
            at_peak=at_peak,
        )

    def _forget_compiled(self, case: Case) -> None:
        """Else new shapes count against a limit that the ones before have used up."""
        kind = (case.model, case.blocks, case.bucket, case.quantize)
        if case.compile and self._compiled_for != kind:
            torch.compiler.reset()
            self._compiled_for = kind

    def _budgets(self, case: Case, devices: Sequence[torch.device]) -> tuple[Budget, ...]:
        if any(device.type == "cpu" for device in devices):
            cards = budgets_of_cards(parse_cards(f"{len(devices)}x RTX 4090", known_cards()))
            rooms = {device: int(room * GIB) for device, room in _rooms(case, devices).items()}
            return tuple(
                replace(card, device=str(d), total=rooms.get(d, card.total), free=rooms.get(d, card.free))
                for card, d in zip(cards, devices, strict=True)
            )
        return tuple(map(self._stopwatch.timed, budgets_of_devices(devices)))


def _settings(case: Case, devices: Sequence[torch.device]) -> Settings:
    quantize: Any = case.quantize
    images = case.frames == 1
    return Settings(
        devices=tuple(devices),
        split_at=case.at,
        quantize=quantize,
        residency=case.residency,
        compile=case.compile,
        cpp_wrapper=case.compile and launches_from_cpp(devices, case.quantize, images=images),
        rank=case.rank,
    )


@dataclass(frozen=True)
class _Trained:
    """Some steps that did not run out of memory."""

    seconds: float
    """Of those that tell of a run's speed, in the mean; of the last one where there are none."""
    residency: str
    first: dict[str, machine.Peak]
    """Peaks of the first one."""


def _train(case: Case, request: Request, devices: Sequence[torch.device], plan: Plan) -> _Trained:
    """Follow the plan from the weights on."""
    family = request.family
    model = family.build_transformer(request.source.transformer)
    placement = place(model, devices, at=plan.split_at, blocks=family.block_lists)
    quantize: Any = case.quantize
    counts = [stage.streamed for stage in plan.stages]
    waiting = streamed_positions(placement, counts)
    machine.reset_peaks(devices)  # where weights alone do not fit, the peak is theirs
    models.fill(
        model,
        family,
        placement,
        dtype=torch.bfloat16,
        rank=case.rank,
        quantize=quantize,
        streamed=waiting,
    )
    machine.reset_peaks(devices)
    optimizer = torch.optim.AdamW(lora_parameters(model).values())
    division = split(
        model,
        devices,
        at=plan.split_at,
        blocks=family.block_lists,
        residency=case.residency,
        compile=case.compile,
        cpp_wrapper=request.cpp_wrapper,
        streamed=counts if any(counts) else None,
        may_stream=True,
        host_limit=request.host_free,
    )
    pipeline = Pipeline(division, slack=request.slack)
    batches = list(_batches(case, request, family))
    times: list[float] = []
    first: dict[str, machine.Peak] = {}
    with attention_backend("auto", devices):
        for number in range(case.steps):
            machine.synchronize(devices)
            begin = time.perf_counter()
            optimizer.zero_grad(set_to_none=True)
            pipeline.step(batches, lambda output, _: models.mean_square(output))
            optimizer.step()
            machine.synchronize(devices)
            times.append(time.perf_counter() - begin)
            if number == 0:
                first = machine.peaks(devices)
                for device in machine.accelerators(devices):
                    torch.accelerator.reset_peak_memory_stats(device)
    return _Trained(fmean(times[UNMEASURED:] or times[-1:]), division.residency_in_words(), first)


def _batches(case: Case, request: Request, family: Family) -> Iterator[dict[str, Any]]:
    bucket, generator = case.bucket, torch.Generator().manual_seed(0)
    shapes = family.cached_shapes(request.source, bucket.frames, bucket.height, bucket.width)
    for _ in range(case.micro_batches):
        cached = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
        noise = torch.randn(shapes["latents"], generator=generator)
        sample = family.make_sample(request.source.traits, cached, noise, 0.9, dtype=torch.bfloat16)
        yield sample.inputs


def _limit(case: Case, devices: Sequence[torch.device]) -> None:
    """Give each device what the case allows it."""
    rooms = _rooms(case, devices)
    for device in dict.fromkeys(devices):
        if device.type == "cuda":
            machine.limit_memory([device], rooms.get(device))


def _rooms(case: Case, devices: Sequence[torch.device]) -> dict[torch.device, float]:
    """GiB of each device, the sum of its stages'; nothing if there are no limits."""
    caps = case.caps * case.stages if len(case.caps) == 1 else case.caps
    found: dict[torch.device, float] = {}
    for device, cap in zip(devices, caps, strict=False):
        found[device] = found.get(device, 0.0) + cap
    return found
