"""The same request with weights in another precision."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from tworeel.planning.budgets import Budget
from tworeel.planning.measured_bytes import known_bytes
from tworeel.planning.measurements import calibrated
from tworeel.planning.requests import Request
from tworeel.planning.traces import TraceSettings

_EIGHT_BITS = ("fp8", "int8")


def eight_bit_kind(budgets: Sequence[Budget]) -> str:
    """The 8 bits that all cards multiply; fp8 where there are none, or both."""
    return next((k for k in _EIGHT_BITS if all(b.mode(k) != "weight-only" for b in budgets)), "fp8")


def less_precise_kinds(request: Request) -> tuple[str, ...]:
    """What takes less than the request's weights, most precise first."""
    if request.trace.quantize is None:
        return eight_bit_kind(request.budgets), "nf4"
    return ("nf4",) if request.trace.quantize in _EIGHT_BITS else ()


def in_precision(request: Request, kind: str) -> Request:
    """The request with weights of this kind, on cards as fast as runs with such weights have found them."""
    settings = replace(request.trace, quantize=kind)
    budgets = tuple(_calibrated_anew(budget, settings) for budget in request.budgets)
    changed = replace(request, trace=settings, budgets=budgets, less_precise=())
    return replace(changed, measured=known_bytes(changed))


def _calibrated_anew(budget: Budget, settings: TraceSettings) -> Budget:
    """What other weights took on the card stands for these where no run has had them."""
    by_figures = replace(budget, rates=budget.rates.slowed(1 / budget.slowdown), measured=False, slowdown=1.0)
    found = calibrated(by_figures, settings)
    return found if found.measured else budget
