from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from real_models import budgets_of, limited

from tworeel.planning import measuring
from tworeel.planning.budgets import Budget
from tworeel.planning.measuring import BACKWARD, FORWARD, Sizes, Stopwatch, measured
from tworeel.units import GIB

SMALL = Sizes(matrix=128, tokens=64, heads=2, head_dim=32, numbers=2**16, seconds=0.01)


def test_a_card_that_is_slower_than_its_figures_is_slowed() -> None:
    """A CPU stands for the card: it is far below an RTX 4090's figures."""
    (budget,) = budgets_of("RTX 4090")
    found = measured(replace(budget, device="cpu"), SMALL)
    assert found.measured and found.slowdown > 10
    assert found.rates.forward(FORWARD) == pytest.approx(found.slowdown * budget.rates.forward(FORWARD))
    assert found.rates.backward(BACKWARD) == pytest.approx(found.slowdown * budget.rates.backward(BACKWARD))


def test_what_was_slowed_already_is_slowed_from_there() -> None:
    (budget,) = budgets_of("RTX 4090")
    slowed = replace(budget, device="cpu", rates=budget.rates.slowed(4.0), slowdown=4.0)
    found = measured(slowed, SMALL)
    assert found.slowdown > 10
    assert found.rates.forward(FORWARD) == pytest.approx(found.slowdown * budget.rates.forward(FORWARD))


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> list[torch.device]:
    """Devices on which the host was timed, which takes half as long again as elsewhere."""
    found: list[torch.device] = []

    def launching(device: torch.device) -> float:
        found.append(device)
        return 1.5

    monkeypatch.setattr(measuring, "launching", launching)
    return found


def test_the_host_that_launches_is_timed_by_what_it_launches(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = torch.device("cpu")
    monkeypatch.setattr(measuring, "LAUNCH", 1.0)
    seconds = measuring.launching(cpu)
    monkeypatch.setattr(measuring, "LAUNCH", 0.5)
    assert 1e-7 < seconds < 1e-3 and measuring.launching(cpu) == pytest.approx(2 * seconds, rel=0.9)


def test_a_card_is_timed_once_and_has_what_is_free_now(
    monkeypatch: pytest.MonkeyPatch, launches: list[torch.device]
) -> None:
    timed: list[str] = []

    def time(budget: Budget) -> Budget:
        timed.append(budget.device)
        return replace(budget, measured=True, slowdown=1.5)

    monkeypatch.setattr(measuring, "measured", time)
    stopwatch = Stopwatch()
    for gib in (24, 12):
        for budget in limited(budgets_of("2x RTX 4090"), gib):
            found = stopwatch.timed(budget)
            assert (found.free, found.slowdown, found.launching) == (gib * GIB, 1.5, 1.5)
    assert timed == ["cuda:0", "cuda:1"] and launches == [torch.device("cuda:0")]


def test_where_a_run_was_measured_the_host_is_timed_all_the_same(launches: list[torch.device]) -> None:
    (card,) = budgets_of("RTX 4090")
    known = replace(card, measured=True)
    assert Stopwatch().timed(known) == replace(known, launching=1.5) and len(launches) == 1
    heard = replace(known, launching=1.2)
    assert Stopwatch().timed(heard) == heard and len(launches) == 1


def test_a_card_without_room_for_a_measurement_is_planned_by_its_figures(
    monkeypatch: pytest.MonkeyPatch, launches: list[torch.device]
) -> None:
    def refuse(_: Budget) -> Budget:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(measuring, "measured", refuse)
    (card,) = budgets_of("RTX 4090")
    assert Stopwatch().timed(card) == replace(card, launching=1.5) and launches
