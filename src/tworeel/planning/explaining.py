"""A plan with what else was weighed, and with what would make it fit."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from tworeel.planning.changing import changes
from tworeel.planning.choosing import Choice, choose
from tworeel.planning.planner import Planner
from tworeel.planning.plans import Alternative, Plan, alternative_of
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


def _decisions(plan: Plan) -> tuple[Any, ...]:
    stages = [(s.device, s.first, s.kept, s.residency, s.streamed) for s in plan.stages]
    return tuple(stages), plan.micro_batches, plan.precision
