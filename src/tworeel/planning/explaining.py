"""A plan with what else was weighed, and with what would make it fit."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from tworeel.data.buckets import tokens
from tworeel.engine.footprints import Footprint
from tworeel.planning.drafts import Means
from tworeel.planning.planner import Planner, Request
from tworeel.planning.plans import Alternative, Plan
from tworeel.planning.tracing import STORED_ONLY, ModelTrace


def plan(request: Request, *, explain: bool = False) -> Plan:
    """Decide which card runs which blocks, and say what that takes.

    Args:
        request: the model, the data, the cards and what is set already.
        explain: weigh alternatives, too.

    Raises:
        ValueError: the request's own settings contradict each other, as `tworeel.engine.place` says.
    """
    planner = Planner(request)
    best = planner.best()
    return replace(
        best,
        alternatives=tuple(_alternatives(planner, best)) if explain else (),
        changes=() if best.fits else tuple(_changes(planner)),
    )


def _alternatives(planner: Planner, best: Plan) -> Iterator[Alternative]:
    """Other ways, and why they are not the plan."""
    request = planner.request
    even = planner.even(len(request.budgets) * request.stages_per_device)
    others: dict[str, dict[str, Any]] = {
        "even shares of the blocks": {"split_at": even, "may_reorder": False},
        "recompute every block": {"residency": "recompute"},
        "keep all activations": {"residency": "keep"},
        "park activations in host memory": {"residency": "offload-selective"},
        "two stages a device": {"stages_per_device": 2, "split_at": None},
        "no slack": {"slack": 0},
        "twice the micro-batches": {"micro_batches": 2 * request.micro_batches},
    }
    for name, change in others.items():
        try:
            found = Planner(replace(request, **change), planner.trace, planner).best()
        except ValueError:
            continue  # two stages a device may be more than there are blocks
        if _decisions(found) != _decisions(best):
            yield _alternative(name, found, best)
    if request.trace.quantize is None:
        # Below what is asked for, so never chosen.
        eight_bit = replace(request, trace=replace(request.trace, quantize="fp8"))
        yield _alternative("8-bit weights (fp8)", Planner(eight_bit, like=planner).best(), best)


def _changes(planner: Planner) -> Iterator[Alternative]:
    """The smallest changes with which it would fit."""
    request = planner.request
    if shorter := _most_frames(planner):
        yield shorter
    if request.trace.quantize is None:
        for kind in ("fp8", "nf4"):
            smaller = replace(request, trace=replace(request.trace, quantize=kind))
            trace = planner.trace if kind in STORED_ONLY else None
            found = Planner(smaller, trace, planner).best()
            if found.fits:
                yield _alternative(f"model.quantize = '{kind}'", found)
                break
    last = request.budgets[-1]
    budgets = (*request.budgets, last.another(len(request.budgets)))
    larger = replace(request, budgets=budgets, split_at=None, streamed=None)
    found = Planner(larger, planner.trace, planner).best()
    if found.fits:
        yield _alternative(f"one more {last.card}", found)


def _most_frames(planner: Planner) -> Alternative | None:
    """The longest clip of the same size that fits."""
    request, largest, traits = planner.request, planner.largest, planner.request.source.traits
    for frames in range(largest.frames - traits.temporal_stride, 0, -traits.temporal_stride):
        bucket = replace(largest, frames=frames)
        share = tokens(bucket, traits) / tokens(largest, traits)
        shorter = replace(request, buckets={bucket: 1.0})
        found = Planner(shorter, _scaled(planner.trace, share), planner).best()
        if found.fits:
            return _alternative(f"clips of at most {frames} frames", found)
    return None


def _decisions(plan: Plan) -> tuple[Any, ...]:
    stages = [(s.device, s.first, s.kept, s.residency, s.streamed) for s in plan.stages]
    return tuple(stages), plan.micro_batches, plan.precision


def _alternative(name: str, found: Plan, best: Plan | None = None) -> Alternative:
    if not found.fits:
        reason = f"does not fit: {found.limit}"
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


def _scaled(trace: ModelTrace, share: float) -> ModelTrace:
    """The trace of a clip of `share` times the tokens: all but attention's work grows with them."""
    means = Means(share, share**2)

    def footprint(found: Footprint) -> Footprint:
        return Footprint(int(found.kept * share), int(found.working * share), int(found.hidden * share))

    return trace.mapped(means.of, footprint)
