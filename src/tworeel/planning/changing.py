"""What would make a run fit that does not."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from tworeel.data.buckets import tokens
from tworeel.engine.footprints import Footprint
from tworeel.engine.split import AUTO
from tworeel.planning.drafts import Means
from tworeel.planning.planner import Planner
from tworeel.planning.plans import Alternative, alternative_of
from tworeel.planning.requests import Request
from tworeel.planning.traces import STORED_ONLY, ModelTrace

_SMALLER: Mapping[str | None, tuple[str, ...]] = {None: ("fp8", "nf4"), "fp8": ("nf4",), "int8": ("nf4",)}
"""What takes less than weights of a kind."""


def changes(planner: Planner) -> Iterator[Alternative]:
    """The smallest changes with which it would fit; first those that change nothing of the training."""
    request = planner.request
    for name, change in _released(request).items():
        found = Planner(replace(request, **change), planner.trace, planner).best()
        if found.fits:
            yield alternative_of(name, found)
            break
    if shorter := _most_frames(planner):
        yield shorter
    for kind in _SMALLER.get(request.trace.quantize, ()):
        smaller = replace(request, trace=replace(request.trace, quantize=kind))
        found = Planner(smaller, _same_trace(planner, kind), planner).best()
        if found.fits:
            yield alternative_of(f"model.quantize = '{kind}'", found)
            break
    last = request.budgets[-1]
    budgets = (*request.budgets, last.another(len(request.budgets)))
    larger = replace(request, budgets=budgets, split_at=None, streamed=None)
    found = Planner(larger, planner.trace, planner).best()
    if found.fits:
        yield alternative_of(f"one more {last.card}", found)


def _same_trace(planner: Planner, quantize: str) -> ModelTrace | None:
    """The trace for weights that are only stored so, which compute as those of full precision."""
    is_plain = planner.request.trace.quantize is None
    return planner.trace if is_plain and quantize in STORED_ONLY else None


def _most_frames(planner: Planner) -> Alternative | None:
    """The longest clip of the same size that fits."""
    request, largest, traits = planner.request, planner.largest, planner.request.source.traits
    for frames in range(largest.frames - traits.temporal_stride, 0, -traits.temporal_stride):
        bucket = replace(largest, frames=frames)
        share = tokens(bucket, traits) / tokens(largest, traits)
        shorter = replace(request, buckets={bucket: 1.0})
        found = Planner(shorter, scaled(planner.trace, share), planner).best()
        if found.fits:
            return alternative_of(f"clips of at most {frames} frames", found)
    return None


def _released(request: Request) -> dict[str, dict[str, Any]]:
    """Settings that the planner would choose itself, or that only save time; each alone, then together."""
    found: dict[str, dict[str, Any]] = {}
    if request.residency != AUTO:
        found["engine.residency = 'auto'"] = {"residency": AUTO}
    if request.streamed is not None:
        found["engine.streamed_blocks not set"] = {"streamed": None}
    if request.split_at is not None:
        found["engine.split_at not set"] = {"split_at": None}
    ways = list(found)
    slack = {"engine.slack = 0": {"slack": 0}} if request.slack > 0 else {}
    tried = [[way] for way in ways] + [ways, [*slack], [*ways, *slack]]
    changes = found | slack
    return {
        " and ".join(names): {key: value for name in names for key, value in changes[name].items()}
        for names in tried
        if names
    }


def scaled(trace: ModelTrace, share: float) -> ModelTrace:
    """The trace of a clip of `share` times the tokens: all but attention's work grows with them."""
    means = Means(share, share**2)

    def footprint(found: Footprint) -> Footprint:
        return Footprint(int(found.kept * share), int(found.working * share), int(found.hidden * share))

    return trace.mapped(means.of, footprint)
