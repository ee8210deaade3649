"""A plan with what else was weighed, and with what would make it fit."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from tworeel.planning.boundaries import neighbours
from tworeel.planning.changing import changes, with_fewer
from tworeel.planning.choosing import STAGES, Choice, choose
from tworeel.planning.planner import Planner
from tworeel.planning.plans import Alternative, Plan, alternative_of, rank
from tworeel.planning.precisions import eight_bit_kind, in_precision
from tworeel.planning.requests import Request


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
        changes=() if best.fits else tuple(changes(planner)),
    )


def _alternatives(planner: Planner, best: Plan) -> Iterator[Alternative]:
    """Other ways, and why they are not the plan."""
    yield from _other_splits(planner, best)
    yield from _other_settings(planner, best)
    for name, request in with_fewer(planner.request):
        why = "all GPUs are used where engine.devices names none"
        yield _weighed(name, Planner(request, like=planner).best(), best, why)
    if planner.request.trace.quantize is None:
        kind = eight_bit_kind(planner.request.budgets)
        found = Planner(in_precision(planner.request, kind), like=planner).best()
        why = "less precise: taken only where model.quantize says so"
        yield _weighed(f"8-bit weights ({kind})", found, best, why)


def _other_splits(planner: Planner, best: Plan) -> Iterator[Alternative]:
    """The best boundaries beside those of the plan, even shares, and the best other order of the devices."""
    request = planner.request.in_order(best.devices)
    if len(best.stages) > 1:
        at, count = best.split_at, best.stages[-1].last + 1
        near = [_with(planner, request, split_at=moved) for moved in neighbours(at, count, 1)]
        if near := [one for one in near if one is not None]:
            found = min(near, key=rank)
            where = ", ".join(map(str, found.split_at))
            yield _weighed(f"boundaries at {where}", found, best, "engine.split_at is set")
        even = _with(planner, request, split_at=planner.even(len(best.stages)))
        if even is not None and even.split_at != at:
            yield _weighed("even shares of the blocks", even, best, "engine.split_at is set")
    free = Planner(replace(planner.request, may_reorder=True), planner.trace, planner)
    cards = [stage.card for stage in best.stages]
    for other in free.by_order:
        if (order := [stage.card for stage in other.stages]) != cards:
            name = f"the order {', '.join(order[: len(free.request.budgets)])}"
            yield _weighed(name, other, best, "the order of the devices is set")
            return


def _other_settings(planner: Planner, best: Plan) -> Iterator[Alternative]:
    request = planner.request
    set_residency = f"engine.residency = '{request.residency}' is set"
    batch = "train.micro_batches is the batch size, which is yours to choose"
    others: dict[str, tuple[dict[str, Any], str]] = {
        "recompute every block": ({"residency": "recompute"}, set_residency),
        "keep all activations": ({"residency": "keep"}, set_residency),
        "park activations in host memory": ({"residency": "offload-selective"}, set_residency),
        "no slack": ({"slack": 0}, "engine.slack takes up jitter, of which no plan knows"),
        "twice the micro-batches": ({"micro_batches": 2 * request.micro_batches}, batch),
    }
    if len(request.budgets) > 1:
        stages = {"stages_per_device": STAGES, "split_at": None}
        others["two stages a device"] = (stages, "only where engine.stages_per_device says so")
    for name, (change, why) in others.items():
        found = _with(planner, request.in_order(best.devices), **change)
        if found is not None and _decisions(found) != _decisions(best):
            yield _weighed(name, found, best, why)


def _with(planner: Planner, request: Request, **change: Any) -> Plan | None:
    """The best plan of a request that is changed so; None if it cannot be, as more stages than blocks."""
    try:
        return Planner(replace(request, **change), planner.trace, planner).best()
    except ValueError:
        return None


def _weighed(name: str, found: Plan, best: Plan, why: str) -> Alternative:
    """With the reason why it is not the plan although it is faster, or fits where that does not."""
    weighed = alternative_of(name, found, best)
    per_clip = [one.seconds_per_step / one.micro_batches for one in (found, best)]
    if found.fits and (not best.fits or per_clip[0] < per_clip[1]):
        return replace(weighed, reason=f"{weighed.reason}; {why}")
    return weighed


def _decisions(plan: Plan) -> tuple[Any, ...]:
    stages = [(s.device, s.first, s.kept, s.residency, s.streamed) for s in plan.stages]
    return tuple(stages), plan.micro_batches, plan.precision
