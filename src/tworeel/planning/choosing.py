"""Chooses what may be left to the planner beside the split: how precise weights are, how many stages a device
has, and from where kernels are launched.

Precision comes before speed: weights stay as precise as they are given where they fit without being streamed.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from tworeel.planning.measured_bytes import known_bytes
from tworeel.planning.planner import Planner
from tworeel.planning.plans import Alternative, Plan, alternative_of, rank
from tworeel.planning.requests import Request
from tworeel.units import GIB

WORTH = 0.03
"""A step must get shorter by more than this share for what costs something else; plans err by as much."""
STAGES = 2
"""That a device may have instead of one."""
_STAGES_LOST = ("one stage a device", "two stages a device")
LONG = 600.0
"""Seconds of a run for which a first step that takes a minute or two more is worth it."""


@dataclass(frozen=True, kw_only=True)
class Choice:
    """What is run, and what was weighed against it."""

    planner: Planner
    """For the request as it was decided."""
    plan: Plan
    lost: tuple[Alternative, ...] = ()


def choose(request: Request) -> Choice:
    """Decide all that the request leaves open.

    Raises:
        ValueError: the request's own settings contradict each other, as `tworeel.engine.place` says.
    """
    return _with_launcher(_with_precision(request))


def _with_precision(request: Request) -> Choice:
    """With weights as precise as they fit."""
    planner, others = Planner(request), request.less_precise
    known: list[Choice] = []
    if others and not planner.has_room_for_weights:
        # Half of the time of a plan is the trace: that of weights which must be streamed may be spared.
        known = [_with_stages(Planner(other, like=planner)) for other in others]
        for choice in known:
            if _level(choice.plan) == 0:
                return replace(choice, lost=(_too_large(planner), *choice.lost))
    first = _with_stages(planner)
    if not others or _level(first.plan) == 0:
        return first
    best, tried = first, [first, *(known or [_with_stages(Planner(o, like=planner)) for o in others])]
    for other in tried[1:]:
        if _is_better(other.plan, best.plan):
            best = other
    lost = [_lost(other.plan, best.plan) for other in tried if other is not best]
    return replace(best, lost=(*lost, *best.lost))


def _with_stages(planner: Planner) -> Choice:
    """With one stage a device, or with two where that is clearly faster, or fits where one does not."""
    request, one = planner.request, planner.best()
    single = Choice(planner=planner, plan=one)
    if not request.may_interleave or len(request.budgets) == 1:
        return single
    changed = replace(request.in_order(one.devices), stages_per_device=STAGES)
    halved = Planner(changed, planner.trace, planner)
    try:
        two = halved.best()
    except ValueError:  # more stages than blocks
        return single
    faster = two.seconds_per_step < (1 - WORTH) * one.seconds_per_step
    if two.fits and (not one.fits or (faster and _level(two) <= _level(one))):
        lost = alternative_of(_STAGES_LOST[0], one, two)
        return Choice(planner=halved, plan=two, lost=(lost,))
    lost = alternative_of(_STAGES_LOST[1], two, one)
    if two.fits:
        lost = replace(lost, reason=f"{lost.reason}; less than {100 * WORTH:.0f} % would be gained")
    return Choice(planner=planner, plan=one, lost=(lost,))


def _with_launcher(choice: Choice) -> Choice:
    """A long run is launched from C++ where its steps wait for the host; the first one takes longer so."""
    planner, plan = choice.planner, choice.plan
    if not planner.request.may_launch_from_cpp or plan.steps * plan.seconds_per_step < LONG:
        return choice
    changed = replace(planner.request.in_order(plan.devices), cpp_wrapper=True)
    if changed.may_interleave:
        changed = replace(changed, stages_per_device=1)
    # What launching alone gains; norms, which may be others then, are no reason.
    found = _with_stages(Planner(changed, planner.trace, planner)).plan
    if found.seconds_per_step >= (1 - WORTH) * plan.seconds_per_step:
        return choice
    again = _with_stages(Planner(replace(changed, measured=known_bytes(changed)), like=planner))
    found = again.plan
    if _level(found) > _level(plan) or found.seconds_per_step > plan.seconds_per_step:
        return choice
    lost = alternative_of("kernels launched from Python", plan, found)
    # Stages a device were weighed again.
    weights = [one for one in choice.lost if one.name not in _STAGES_LOST]
    return replace(again, lost=(*weights, lost, *again.lost))


def _is_better(plan: Plan, best: Plan) -> bool:
    """Whether a plan with other weights is, that comes later in the order of preference."""
    if (ours := _level(plan)) != (theirs := _level(best)):
        return ours < theirs
    return not plan.fits and rank(plan) < rank(best)


def _level(plan: Plan) -> int:
    """0: fits; 1: fits where weights are streamed; 2: does not."""
    if not plan.fits:
        return 2
    return int(plan.num_streamed > 0)


def _too_large(planner: Planner) -> Alternative:
    """Weights that were not planned with."""
    settings, budgets = planner.request.trace, planner.request.budgets
    name = settings.quantize or str(settings.dtype).removeprefix("torch.")
    held, free = (size / GIB for size in (planner.weights, sum(budget.free for budget in budgets)))
    reason = f"the weights alone take {held:.1f} of {free:.1f} GiB: some would have to be streamed"
    return Alternative(name=f"{name} weights", fits=False, seconds_per_step=None, peaks=(), reason=reason)


def _lost(plan: Plan, best: Plan) -> Alternative:
    """Other weights, and why they are not taken."""
    found = alternative_of(f"{plan.precision} weights", plan, best)
    if plan.fits and _level(plan) > _level(best):
        streamed = f"fits only with the weights of {plan.num_streamed} blocks streamed"
        return replace(found, reason=f"{streamed}; {found.reason}")
    if plan.fits:
        return replace(found, reason=f"{found.reason}; {best.precision} is more precise and fits so too")
    return found
