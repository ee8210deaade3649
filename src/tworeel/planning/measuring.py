"""A short measurement of a card that is there: how it compares with its vendor's figures."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch.nn.functional import scaled_dot_product_attention

from tworeel.engine.releasing import release_memory
from tworeel.planning.budgets import Budget
from tworeel.planning.timing import TRAFFIC_SHARE, Rates
from tworeel.planning.work import Work

FORWARD = Work({torch.bfloat16: 1.23e13}, 8.6e12, 1.3e10, weights=6e8)
BACKWARD = Work({torch.bfloat16: 1.24e13}, 2.16e13, 2.1e10, weights=1.1e9)
"""What is compared: a compiled block of a 14B model with 20,280 tokens."""
PASS_SHARE = 0.9
"""Of a card's bandwidth that a plain pass over memory reaches, which is what is timed; a block's own traffic
reaches less."""

LAUNCH = 5.5e-6
"""Seconds of the host to launch a small operation, where the figures of `timing` hold: one machine took 6.7,
and 1.22 times as long for an image of Wan 14B as they say."""
_LAUNCHES = 500
"""In a row: fewer than a card queues."""
_COPIED = 2**26
"""Bytes of a copy between card and host: as many as a large tensor that is parked."""


@dataclass(frozen=True)
class Sizes:
    """What is measured: some three seconds, and less than a GiB of the card."""

    matrix: int = 8192
    tokens: int = 8192
    heads: int = 16
    head_dim: int = 128
    numbers: int = 2**27
    seconds: float = 0.4
    """For which each kind of work goes on before it is timed, and while it is: a card that is cool and idle
    is faster than one in the midst of a training."""


class Stopwatch:
    """Times what of this machine no run has measured yet: devices, each once, and the host."""

    def __init__(self) -> None:
        self._known: dict[str, Budget] = {}
        self._links: dict[str, float] = {}
        self._launching: float | None = None

    def timed(self, budget: Budget) -> Budget:
        """The device with the speed that it has, as far as there is room to find that out."""
        try:
            if budget.launching is None:
                if self._launching is None:
                    self._launching = launching(torch.device(budget.device))
                budget = replace(budget, launching=self._launching)
            if budget.device not in self._links:
                self._links[budget.device] = link_rate(torch.device(budget.device))
            link = self._links[budget.device]
            budget = replace(budget, rates=budget.rates.linked(link))
            if budget.measured:
                return budget
            if budget.device not in self._known:
                self._known[budget.device] = measured(budget)
        except torch.OutOfMemoryError:
            return budget  # so little is left that the plan will not fit either
        finally:
            release_memory()
        known = self._known[budget.device]
        return replace(known, total=budget.total, free=budget.free, launching=budget.launching)


def link_rate(device: torch.device) -> float:
    """Bytes a second between a card and pinned host memory, the slower way: a slot may have fewer lanes."""
    here = torch.empty(_COPIED, dtype=torch.uint8, device=device)
    there = torch.empty(_COPIED, dtype=torch.uint8, pin_memory=device.type != "cpu")
    ways = (here, there), (there, here)
    return _COPIED / max(_time(device, 0.02, partial(to.copy_, of, non_blocking=True)) for to, of in ways)


def launching(device: torch.device) -> float:
    """How much longer the host takes to launch than the one that the figures are of."""
    number = torch.zeros(1, device=device)
    found = []
    for _ in range(5):
        _synchronize(device)
        begin = time.perf_counter()
        for _ in range(_LAUNCHES):
            number.add_(1)
        found.append((time.perf_counter() - begin) / _LAUNCHES)
    _synchronize(device)
    return min(found) / LAUNCH


def measured(budget: Budget, sizes: Sizes = Sizes()) -> Budget:
    """The device with the speed that it has.

    Args:
        budget: of a device of this machine, with the rates of its card.
        sizes: of what is measured.
    """
    found = _rates(torch.device(budget.device), budget.rates, sizes)
    slowdown = _seconds(found) / _seconds(budget.rates)
    return replace(
        budget, rates=budget.rates.slowed(slowdown), measured=True, slowdown=budget.slowdown * slowdown
    )


def _seconds(rates: Rates) -> float:
    return rates.forward(FORWARD) + rates.backward(BACKWARD)


def _rates(device: torch.device, rates: Rates, sizes: Sizes) -> Rates:
    """The card's rates as they are measured, one kind of work after the other."""
    forward, backward = _attention_rates(device, sizes)
    return replace(
        rates,
        bf16=_product_rate(device, sizes),
        products={},
        attention=forward,
        attention_backward=backward,
        traffic=TRAFFIC_SHARE / PASS_SHARE * _traffic_rate(device, sizes),
    )


def _product_rate(device: torch.device, sizes: Sizes) -> float:
    matrix = torch.randn(sizes.matrix, sizes.matrix, device=device, dtype=torch.bfloat16)
    return 2.0 * sizes.matrix**3 / _time(device, sizes.seconds, lambda: matrix @ matrix)


def _attention_rates(device: torch.device, sizes: Sizes) -> tuple[float, float]:
    shape = (1, sizes.heads, sizes.tokens, sizes.head_dim)
    query = torch.randn(shape, device=device, dtype=torch.bfloat16, requires_grad=True)
    output = scaled_dot_product_attention(query, query, query)
    upstream = torch.ones_like(output)

    def backward() -> object:
        return torch.autograd.grad(output, query, upstream, retain_graph=True)

    count = 4.0 * sizes.heads * sizes.tokens**2 * sizes.head_dim
    forward = _time(device, sizes.seconds, lambda: scaled_dot_product_attention(query, query, query))
    return count / forward, 2.5 * count / _time(device, sizes.seconds, backward)


def _traffic_rate(device: torch.device, sizes: Sizes) -> float:
    numbers = torch.zeros(sizes.numbers, device=device, dtype=torch.bfloat16)
    return 2.0 * numbers.nbytes / _time(device, sizes.seconds, lambda: numbers.add_(1))


def _time(device: torch.device, seconds: float, work: Callable[[], object]) -> float:
    """Seconds of one round, once the work has gone on for a while."""
    _rounds(device, 1, work)
    count = max(1, round(seconds / _rounds(device, 3, work)))
    _rounds(device, count, work)
    return _rounds(device, count, work)


def _rounds(device: torch.device, count: int, work: Callable[[], object]) -> float:
    """Mean seconds of so many rounds."""
    _synchronize(device)
    begin = time.perf_counter()
    for _ in range(count):
        work()
    _synchronize(device)
    return (time.perf_counter() - begin) / count


def _synchronize(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
