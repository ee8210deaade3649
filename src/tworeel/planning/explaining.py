"""A plan with what else was weighed, and with what would make it fit."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from tworeel.data.buckets import tokens
from tworeel.engine.footprints import Footprint
from tworeel.planning.choosing import Choice, choose
from tworeel.planning.drafts import Means
from tworeel.planning.planner import Planner, Request
from tworeel.planning.plans import Alternative, Plan, alternative_of
from tworeel.planning.tracing import STORED_ONLY, ModelTrace

_SMALLER: Mapping[str | None, tuple[str, ...]] = {None: ("fp8", "nf4"), "fp8": ("nf4",), "int8": ("nf4",)}
"""What takes less than weights of a kind."""


def plan(request: Request, *, explain: bool = False) -> Plan:
    """Decide which card runs which blocks, and say what that takes.

    Args:
        request: the model, the data, the cards and what is set already.
        explain: weigh alternatives, too.

    Raises:
        ValueError: the request's own settings contradict each other, as `tworeel.engine.place` says.
    """
    return explained(choose(request), explain=explain)


def explained(choice: Choice, *, explain: bool = False) -> Plan:
    """The plan with what lost against it; where it does not fit, with what would.

    Args:
        choice: what was decided.
        explain: weigh alternatives that were not up for choice, too.
    """
    planner, best = choice.planner, choice.plan
    known = {one.name for one in choice.lost}
    more = _alternatives(planner, best) if explain else ()
    return replace(
        best,
        alternatives=(*choice.lost, *(one for one in more if one.name not in known)),
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
            yield alternative_of(name, found, best)
    if request.trace.quantize is None:
        # Below what is asked for, so never chosen.
        eight_bit = replace(request, trace=replace(request.trace, quantize="fp8"))
        yield alternative_of("8-bit weights (fp8)", Planner(eight_bit, like=planner).best(), best)


def _changes(planner: Planner) -> Iterator[Alternative]:
    """The smallest changes with which it would fit."""
    request = planner.request
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


def _decisions(plan: Plan) -> tuple[Any, ...]:
    stages = [(s.device, s.first, s.kept, s.residency, s.streamed) for s in plan.stages]
    return tuple(stages), plan.micro_batches, plan.precision


def scaled(trace: ModelTrace, share: float) -> ModelTrace:
    """The trace of a clip of `share` times the tokens: all but attention's work grows with them."""
    means = Means(share, share**2)

    def footprint(found: Footprint) -> Footprint:
        return Footprint(int(found.kept * share), int(found.working * share), int(found.hidden * share))

    return trace.mapped(means.of, footprint)
