"""What else was weighed, and why it is not the plan."""

from __future__ import annotations

from typing import Any

import pytest
from real_models import budgets_of, request_of

from tworeel.planning import Alternative, Plan, plan
from tworeel.planning.planner import Planner


def explained(**changes: Any) -> tuple[Plan, dict[str, Alternative]]:
    found = plan(request_of(**changes), explain=True)
    return found, {one.name: one for one in found.alternatives}


@pytest.mark.parametrize("gpus", ["RTX 4090", "2x RTX 4090", "4x H100 80GB"])
def test_what_would_be_faster_comes_with_the_reason_why_it_is_not_taken(gpus: str) -> None:
    found, named = explained(budgets=budgets_of(gpus))
    per_clip = found.seconds_per_step / found.micro_batches
    for one in named.values():
        assert one.seconds_per_step is not None
        clips = found.micro_batches * (2 if one.name == "twice the micro-batches" else 1)
        if one.fits and one.seconds_per_step / clips < per_clip:
            assert "; " in one.reason, one.name
    assert "model.quantize" in named["8-bit weights (fp8)"].reason


def test_one_card_has_no_two_stages_to_weigh() -> None:
    found, named = explained(budgets=budgets_of("RTX 4090"))
    assert "two stages a device" not in named
    asked = plan(request_of(budgets=budgets_of("RTX 4090"), stages_per_device=2))
    assert asked.bubble == pytest.approx(0)
    assert asked.seconds_per_step > 0.95 * found.seconds_per_step


def test_parking_is_weighed_with_the_weights_streamed_that_it_needs() -> None:
    found, named = explained(budgets=budgets_of("2x RTX 4090"))
    parked = named["park activations in host memory"]
    assert found.num_streamed > 0 and parked.fits and named["recompute every block"].fits
    assert parked.reason.endswith("times the time of a clip")


def test_the_best_other_boundary_and_the_other_order_are_shown() -> None:
    found, named = explained(budgets=budgets_of("RTX 3060 12GB, RTX 4090"), may_reorder=True)
    (at,) = found.split_at
    (near,) = [
        one for name, one in named.items() if name in (f"boundaries at {at - 1}", f"boundaries at {at + 1}")
    ]
    other = named[f"the order {found.stages[1].card}, {found.stages[0].card}"]
    for one in (near, other):
        assert not one.fits or (one.seconds_per_step or 0) >= found.seconds_per_step


def test_each_kind_of_card_is_weighed_away() -> None:
    made = plan(request_of(budgets=budgets_of("RTX 5090, RTX 3060 12GB"), micro_batches=1), explain=True)
    names = [one.name for one in made.alternatives]
    assert "without RTX 3060 12GB" in names
    assert "without RTX 5090" in names


def test_an_order_that_is_set_says_so_where_another_is_faster() -> None:
    request = {"budgets": budgets_of("RTX 3060 12GB, RTX 4090")}
    orders = [Planner(request_of(**request, may_reorder=may)).best() for may in (False, True)]
    _, named = explained(**request)
    other = named["the order RTX 4090, RTX 3060 12GB"]
    faster = orders[1].devices != orders[0].devices
    assert other.reason.endswith("the order of the devices is set") == faster


def test_alike_cards_have_no_other_order() -> None:
    _, named = explained(budgets=budgets_of("2x RTX 4090"))
    assert not any(name.startswith("the order") for name in named)


def test_what_does_not_go_with_a_setting_is_left_out() -> None:
    found, named = explained(streamed=(2, 0))
    assert [stage.streamed for stage in found.stages] == [2, 0]
    assert "two stages a device" not in named and "recompute every block" in named
