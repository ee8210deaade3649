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


LINK = 6e9


@pytest.fixture
def links(monkeypatch: pytest.MonkeyPatch) -> list[torch.device]:
    """Devices whose links were timed: those of a slot of four lanes."""
    found: list[torch.device] = []

    def link_rate(device: torch.device) -> float:
        found.append(device)
        return LINK

    monkeypatch.setattr(measuring, "link_rate", link_rate)
    return found


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


@pytest.mark.parametrize(("gpu", "links_of_its_own"), [("RTX 4090", False), ("RTX 3090", True)])
def test_what_a_card_has_no_link_for_crosses_at_the_rate_of_its_slot(
    gpu: str, links_of_its_own: bool
) -> None:
    (card,) = budgets_of(gpu)
    slower = card.rates.linked(LINK)
    assert slower.host == LINK < card.rates.host
    assert slower.crossing == (card.rates.crossing if links_of_its_own else LINK)
    assert slower.bf16 == card.rates.bf16 and slower.slowed(2.0).host == LINK


def test_a_link_is_timed_by_what_it_copies() -> None:
    rate = measuring.link_rate(torch.device("cpu"))
    assert 1e8 < rate < 1e12


def test_a_card_is_timed_once_and_has_what_is_free_now(
    monkeypatch: pytest.MonkeyPatch, launches: list[torch.device], links: list[torch.device]
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
            assert found.rates.host == found.rates.crossing == LINK
    assert timed == ["cuda:0", "cuda:1"] and launches == [torch.device("cuda:0")]
    assert links == [torch.device("cuda:0"), torch.device("cuda:1")]


def test_where_a_run_was_measured_host_and_link_are_timed_all_the_same(
    launches: list[torch.device], links: list[torch.device]
) -> None:
    (card,) = budgets_of("RTX 4090")
    known = replace(card, measured=True, rates=card.rates.linked(LINK))
    unlinked = replace(card, measured=True)
    assert Stopwatch().timed(unlinked) == replace(known, launching=1.5) and len(launches) == 1
    heard = replace(known, launching=1.2)
    assert Stopwatch().timed(heard) == heard and len(launches) == 1 and len(links) == 2


@pytest.mark.usefixtures("links")
def test_a_card_without_room_for_a_measurement_is_planned_by_its_figures(
    monkeypatch: pytest.MonkeyPatch, launches: list[torch.device]
) -> None:
    def refuse(_: Budget) -> Budget:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(measuring, "measured", refuse)
    (card,) = budgets_of("RTX 4090")
    assert Stopwatch().timed(card) == replace(card, launching=1.5, rates=card.rates.linked(LINK)) and launches
