"""A device that has run out of memory, in words: nothing is made smaller silently."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Protocol

import torch

from tworeel.errors import UserError
from tworeel.planning.plans import Plan
from tworeel.report.plan import misfit
from tworeel.training.devices import peak_memory, room
from tworeel.units import gibibytes

_NEEDS_LESS = (
    "What needs less: engine.residency = 'auto' or 'offload', engine.streamed_blocks, "
    "model.quantize = 'fp8', fewer data.frames, a smaller data.resolution, another boundary "
    "(engine.split_at), one more device"
)


class Planned(Protocol):
    """A run that was planned: `tworeel.training.planned.PlannedRun`."""

    plan: Plan

    def would_fit(self, room: Mapping[str, int]) -> tuple[str, ...] | None:
        """What would fit into so many bytes by device; None if the plan does."""


def out_of_memory(
    error: torch.OutOfMemoryError,
    devices: Sequence[torch.device],
    kept: str,
    planned: Planned | None = None,
) -> UserError:
    """Say which device ran out, what the peaks were and what would need less, or fit what is left.

    Args:
        error: torch's.
        devices: of the run.
        kept: what is not lost, in a sentence.
        planned: the run's plan, if there was one.
    """
    first_line = str(error).splitlines()[0]
    plans = planned.plan.peaks if planned else {}
    peaks = [
        f"{name} {gibibytes(size)}{f' (planned {gibibytes(plans[name])})' if name in plans else ''}"
        for name, size in peak_memory(devices).items()
    ]
    return UserError(
        f"out of memory{_where(first_line, devices)}: {first_line} Peaks so far: {', '.join(peaks)}. {kept} "
        f"{_advice(devices, planned)}"
    )


def _where(line: str, devices: Sequence[torch.device]) -> str:
    """The device that torch names; nothing if it names none of the run's."""
    found = re.search(r"GPU (\d+)", line)
    names = [str(d) for d in devices if d.type != "cpu" and found and d.index == int(found[1])]
    return f" on {names[0]}" if names else ""


def _advice(devices: Sequence[torch.device], planned: Planned | None) -> str:
    if planned is None:
        return _NEEDS_LESS
    now = room(devices)
    try:
        fitting = planned.would_fit(now)
    except Exception as broken:  # noqa: BLE001  # torch's tracing may raise anything; the shortage is what counts
        return f"{_NEEDS_LESS}. What fits could not be planned ({type(broken).__name__}: {broken})"
    if fitting is None:
        return _NEEDS_LESS if planned.plan.fits else f"The plan did not fit: {misfit(planned.plan)}"
    had = dict.fromkeys(now, 0)
    for stage in planned.plan.stages:
        had[stage.device] += stage.free
    rooms = ", ".join(
        f"{name} {gibibytes(size)} (planned with {gibibytes(had[name])})" for name, size in now.items()
    )
    fits = "; ".join(fitting) or f"nothing that is known. {_NEEDS_LESS}"
    return f"There is less memory now than was planned with: {rooms}. What would fit it: {fits}"
