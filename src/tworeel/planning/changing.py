"""What would make a run fit that does not."""

from __future__ import annotations

import itertools
from bisect import bisect_left
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from math import ceil, floor
from typing import Any

import torch

from tworeel.data.buckets import block_tokens, least_frames
from tworeel.data.clips import Bucket
from tworeel.engine.footprints import Footprint
from tworeel.engine.split import AUTO
from tworeel.host_memory import HOST_SHARE
from tworeel.planning.budgets import Budget
from tworeel.planning.drafts import Means
from tworeel.planning.planner import Planner
from tworeel.planning.plans import Alternative, Plan, alternative_of
from tworeel.planning.precisions import in_precision, less_precise_kinds
from tworeel.planning.requests import Request
from tworeel.planning.traces import ModelTrace
from tworeel.units import GIB

FULL = 0.7
"""A card with less than this share of what the emptiest of its name has free is full."""
LEAST_SIDE = 256
"""Pixels of a clip's longer side: smaller ones are not proposed."""


def changes(planner: Planner) -> Iterator[Alternative]:
    """The smallest changes with which it would fit; first those that change nothing of the training.

    Devices stay in the order that is nearest to fitting.
    """
    planner = Planner(planner.request.in_order(planner.best().devices), planner.trace, planner)
    alone = itertools.chain(_released(planner), _others(planner))
    if (first := next(alone, None)) is None:
        yield from _beside_released(planner)
    else:
        yield first
        yield from alone


def _others(planner: Planner) -> Iterator[Alternative]:
    """Changes of more than what is set needlessly."""
    for change in (_fewer_devices, _more_host_memory, _smaller_clips, _less_precise, _one_more_device):
        if found := change(planner):
            yield found


def _beside_released(planner: Planner) -> Iterator[Alternative]:
    """The other changes where settings have to be released for them: the first of these that help."""
    for name, change in _settings(planner.request).items():
        released = Planner(replace(planner.request, **change), planner.trace, planner)
        if found := list(_others(released)):
            yield from (replace(one, name=f"{name} and {one.name}") for one in found)
            return


def _released(planner: Planner) -> Iterator[Alternative]:
    """The first settings without which it fits, if there are such."""
    for name, change in _settings(planner.request).items():
        found = _plan(planner, replace(planner.request, **change))
        if found.fits:
            yield alternative_of(name, found)
            return


def _settings(request: Request) -> dict[str, dict[str, Any]]:
    """What the planner would choose itself, and what only saves time; each alone, then together."""
    residency = {"engine.residency = 'auto'": {"residency": AUTO}} if request.residency != AUTO else {}
    stages = (
        {"engine.stages_per_device = 1": {"stages_per_device": 1}} if request.stages_per_device > 1 else {}
    )
    slack = {"engine.slack = 0": {"slack": 0}} if request.slack > 0 else {}
    of_stages = _of_stages(request)
    ways = [*residency, *stages, *of_stages]
    # What is set for each stage goes with their number.
    alone = [[way, *of_stages] if way in stages else [way] for way in ways]
    tried = [*alone, ways, [*slack], [*ways, *slack]]
    changes: dict[str, dict[str, Any]] = {**residency, **stages, **of_stages, **slack}
    return {
        " and ".join(names): {key: value for name in names for key, value in changes[name].items()}
        for names in tried
        if names
    }


def _of_stages(request: Request) -> dict[str, dict[str, Any]]:
    """Settings that are one for each stage, if they are set."""
    found: dict[str, dict[str, Any]] = {}
    if request.streamed is not None:
        found["engine.streamed_blocks not set"] = {"streamed": None}
    if request.split_at is not None:
        found["engine.split_at not set"] = {"split_at": None}
    return found


def _fewer_devices(planner: Planner) -> Alternative | None:
    """The fastest of those without a card that holds the others up: each stage has to hold a block."""
    plans = {name: Planner(request, like=planner).best() for name, request in with_fewer(planner.request)}
    fitting = [(name, plan) for name, plan in plans.items() if plan.fits]
    return alternative_of(*min(fitting, key=lambda one: one[1].seconds_per_step)) if fitting else None


def with_fewer(request: Request) -> Iterator[tuple[str, Request]]:
    """The request without each kind of card that there is beside others, and what has to be set for it."""
    most = {budget.card: 0 for budget in request.budgets}
    for budget in request.budgets:
        most[budget.card] = max(most[budget.card], budget.free)

    def kind(budget: Budget) -> tuple[str, bool]:
        return budget.card, budget.free < FULL * most[budget.card]

    kinds = dict.fromkeys(map(kind, request.budgets))
    for card, is_full in kinds:
        which = f"the full {card}" if is_full else f"the empty {card}" if (card, True) in kinds else card
        if left := tuple(budget for budget in request.budgets if kind(budget) != (card, is_full)):
            names = [f"without {which}{_devices_set(left)}", *_of_stages(request)]
            yield " and ".join(names), replace(request, budgets=left, split_at=None, streamed=None)


def _devices_set(left: Sequence[Budget]) -> str:
    """What has to be set to use these alone; cards by name are no devices of this machine."""
    if any(budget.context is not None for budget in left):
        return ""
    return f": engine.devices = [{', '.join(repr(budget.device) for budget in left)}]"


def _more_host_memory(planner: Planner) -> Alternative | None:
    """Where that is all that is short; in GiB of the machine, of which a share may be pinned."""
    request = planner.request
    most = _plan(planner, replace(request, host_free=2**62))
    if not most.fits:
        return None
    now, enough = (size / HOST_SHARE / GIB for size in (request.host_free, most.host_memory))
    # One more at the end, as the share of whole GiB is rounded
    sizes = range(floor(now) + 1, ceil(enough) + 2)
    found = _first(sizes, lambda gib: _plan(planner, replace(request, host_free=int(HOST_SHARE * gib * GIB))))
    return found and alternative_of(f"{found[0]} GiB of available host memory", found[1])


def _smaller_clips(planner: Planner) -> Alternative | None:
    """Shorter ones; where there are none that fit, smaller ones."""
    longest, traits = planner.largest.frames, planner.request.source.traits
    lengths = range(longest - traits.temporal_stride, least_frames(traits) - 1, -traits.temporal_stride)

    def cut_to(frames: int) -> Callable[[Bucket], Bucket]:
        return lambda clip: replace(clip, frames=min(frames, clip.frames))

    if found := _first_clips(planner, lengths, cut_to):
        frames = "1 frame" if found[0] == 1 else f"{found[0]} frames"
        return alternative_of(f"clips of at most {frames}, longer ones cut", found[1])
    return _lower_resolution(planner)


def _lower_resolution(planner: Planner) -> Alternative | None:
    multiple, largest = planner.request.source.traits.spatial_multiple, planner.largest
    longest = max(largest.height, largest.width)

    def scaled_by(side: int) -> Callable[[Bucket], Bucket]:
        def to_multiple(length: int) -> int:
            return max(1, length * side // (longest * multiple)) * multiple

        return lambda clip: replace(clip, height=to_multiple(clip.height), width=to_multiple(clip.width))

    found = _first_clips(planner, range(longest - multiple, LEAST_SIDE - 1, -multiple), scaled_by)
    if found is None:
        return None
    size = scaled_by(found[0])(largest)
    return alternative_of(f"{size.width} × {size.height} pixels (data.resolution)", found[1])


def _first_clips(
    planner: Planner, sizes: Sequence[int], to_size: Callable[[int], Callable[[Bucket], Bucket]]
) -> tuple[int, Plan] | None:
    """The first of these sizes with which the same mix of clips, each made smaller, fits.

    Traces are scaled for the search, and what it finds is traced: who follows the proposal plans with that.
    """
    nearest = planner

    def plan(size: int) -> Plan:
        request = _with_clips(planner.request, to_size(size))
        return Planner(request, _scaled_to(request, nearest), planner).best()

    while found := _first(sizes, plan):
        size = found[0]
        traced = Planner(_with_clips(planner.request, to_size(size)), like=planner)
        if (best := traced.best()).fits:
            return size, best
        sizes, nearest = sizes[sizes.index(size) + 1 :], traced
    return None


def _with_clips(request: Request, smaller: Callable[[Bucket], Bucket]) -> Request:
    """With the same mix of clips, each made smaller."""
    buckets: dict[Bucket, float] = defaultdict(float)
    for bucket, weight in request.buckets.items():
        buckets[smaller(bucket)] += weight
    return replace(request, buckets=buckets)


def _scaled_to(request: Request, known: Planner) -> ModelTrace:
    """What a planner knows, scaled to the largest clip of a request."""
    traits = request.source.traits
    most = max(block_tokens(bucket, traits) for bucket in request.buckets)
    return scaled(known.trace, most / block_tokens(known.largest, traits))


def _less_precise(planner: Planner) -> Alternative | None:
    for kind in less_precise_kinds(planner.request):
        found = Planner(in_precision(planner.request, kind), like=planner).best()
        if found.fits:
            return alternative_of(f"model.quantize = '{kind}'", found)
    return None


def _one_more_device(planner: Planner) -> Alternative | None:
    """The last card once more, by a name that no other has, if there are blocks for it."""
    budgets = planner.request.budgets
    blocks = sum(stage.num_blocks for stage in planner.best().stages)
    if (len(budgets) + 1) * planner.request.stages_per_device > blocks:
        return None
    used = {torch.device(budget.device).index for budget in budgets}
    free = next(number for number in itertools.count() if number not in used)
    larger = (*budgets, budgets[-1].another(free))
    found = _plan(planner, replace(planner.request, budgets=larger, split_at=None, streamed=None))
    name = " and ".join([f"one more {budgets[-1].card}", *_of_stages(planner.request)])
    return alternative_of(name, found) if found.fits else None


def _plan(planner: Planner, request: Request) -> Plan:
    """Of a request that differs in nothing that a trace depends on."""
    return Planner(request, planner.trace, planner).best()


def _first(sizes: Sequence[int], plan: Callable[[int], Plan]) -> tuple[int, Plan] | None:
    """The first of these sizes with a plan that fits; all behind one that fits are taken to fit, too."""
    plans: dict[int, Plan] = {}

    def fits(size: int) -> bool:
        plans[size] = plan(size)
        return plans[size].fits

    place = bisect_left(sizes, True, key=fits)
    return (sizes[place], plans[sizes[place]]) if place < len(sizes) else None


def scaled(trace: ModelTrace, share: float) -> ModelTrace:
    """The trace of a clip with `share` times the tokens in a block; attention grows with their square."""
    means = Means(share, share**2)

    def footprint(found: Footprint) -> Footprint:
        return Footprint(int(found.kept * share), int(found.working * share), int(found.hidden * share))

    blocks = trace.mapped(means.of, footprint)
    return replace(blocks, inputs=int(share * trace.inputs), head=int(share * trace.head))
