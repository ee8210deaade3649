"""What may be left to the planner beside the split: precision of the weights, stages a device, and from where
kernels are launched."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from real_models import IMAGE, budgets_of, limited, request_of

from tworeel.data.clips import Bucket
from tworeel.planning import Planner, plan
from tworeel.planning.choosing import LONG, WORTH, choose
from tworeel.planning.requests import Request
from tworeel.planning.traces import TraceSettings
from tworeel.planning.tracing import trace_model
from tworeel.units import GIB

FOUR = budgets_of("4x H100 80GB")


def precision_open(kind: str = "fp8", **changes: Any) -> Request:
    """bf16, or weights of this kind where that is needed."""
    request = request_of(**changes)
    return replace(request, less_precise=(replace(request, trace=replace(request.trace, quantize=kind)),))


def test_weights_stay_as_they_are_where_they_fit() -> None:
    found = plan(precision_open())
    assert found.fits and found.precision == "bfloat16" and found.alternatives == ()


def test_eight_bits_are_taken_where_weights_would_be_streamed() -> None:
    found = plan(precision_open(budgets=budgets_of("2x RTX 4090")))
    assert found.fits and found.precision == "fp8" and found.num_streamed == 0
    (lost,) = found.alternatives
    assert lost.name == "bfloat16 weights" and lost.fits
    assert "fits only with the weights of" in lost.reason and "times the time of a clip" in lost.reason


def test_weights_stay_precise_where_eight_bits_must_be_streamed_too() -> None:
    found = plan(precision_open("int8", budgets=budgets_of("2x RTX 3060 12GB"), slack=0))
    assert found.fits and found.precision == "bfloat16"
    assert "bfloat16 is more precise and fits so too" in found.alternatives[0].reason


def test_weights_that_the_cards_cannot_hold_are_not_even_traced(monkeypatch: pytest.MonkeyPatch) -> None:
    traced: list[str | None] = []

    def trace(family: Any, source: Any, bucket: Bucket, settings: TraceSettings, **launching: bool) -> Any:
        traced.append(settings.quantize)
        return trace_model(family, source, bucket, settings, **launching)

    monkeypatch.setattr("tworeel.planning.planner.trace_model", trace)
    found = plan(precision_open(budgets=budgets_of("RTX 4090"), buckets={IMAGE: 1.0}))
    assert found.fits and found.precision == "fp8" and traced == ["fp8"]
    (lost,) = found.alternatives
    assert lost.name == "bfloat16 weights" and lost.seconds_per_step is None and not lost.peaks
    assert lost.reason.startswith("the weights alone take 26.7 of 23.0 GiB")
    assert "streamed" in lost.reason


def test_what_fits_in_no_way_is_planned_in_the_way_that_is_nearest() -> None:
    long = Bucket(frames=81, height=720, width=1280)
    request = precision_open(budgets=budgets_of("2x RTX 3060 12GB"), buckets={long: 1.0})
    found = plan(request)
    wanted = [sum(one.peaks) for one in found.alternatives]
    assert not found.fits and found.precision == "fp8"
    assert sum(stage.peak for stage in found.stages) < wanted[0]


def test_two_stages_a_device_are_taken_where_a_step_is_clearly_shorter() -> None:
    request = request_of(budgets=FOUR, micro_batches=4, may_interleave=True)
    choice = choose(request)
    (lost,) = choice.lost
    assert choice.plan.stages_per_device == 2 and choice.planner.request.stages_per_device == 2
    assert choice.plan.fits and lost.name == "one stage a device"
    assert choice.plan.seconds_per_step < (1 - WORTH) * lost.seconds_per_step
    assert [stage.device for stage in choice.plan.stages] == [f"cuda:{i}" for i in range(4)] * 2


def test_one_stage_a_device_stays_where_two_are_hardly_faster() -> None:
    found = plan(request_of(micro_batches=32, may_interleave=True))
    assert found.stages_per_device == 1
    (lost,) = found.alternatives
    assert lost.name == "two stages a device" and "less than 3 % would be gained" in lost.reason


def test_one_stage_a_device_stays_where_two_do_not_fit() -> None:
    found = plan(request_of(budgets=budgets_of("RTX 4090, RTX 3060 12GB"), may_interleave=True))
    (lost,) = found.alternatives
    assert found.stages_per_device == 1 and lost.reason.startswith("does not fit")


@pytest.mark.parametrize("gpus", ["1x H100 80GB", "2x H100 80GB"])
def test_nothing_is_chosen_that_was_not_left_open(gpus: str) -> None:
    choice = choose(request_of(budgets=budgets_of(gpus), micro_batches=2))
    assert choice.lost == () and choice.plan.stages_per_device == 1 and choice.plan.precision == "bfloat16"


def test_a_single_card_has_one_stage() -> None:
    assert choose(request_of(budgets=FOUR[:1], may_interleave=True)).plan.stages_per_device == 1


def test_what_was_weighed_is_explained_once() -> None:
    request = request_of(budgets=budgets_of("RTX 4090, RTX 3060 12GB"), may_interleave=True)
    names = [one.name for one in plan(request, explain=True).alternatives]
    assert names.count("two stages a device") == 1 and "8-bit weights (int8)" in names


def test_where_eight_bits_do_not_fit_four_may() -> None:
    card = limited(budgets_of("RTX 4090"), 13)
    found = plan(precision_open(budgets=card, buckets={IMAGE: 1.0}, host_free=2 * GIB))
    names = [change.name for change in found.changes]
    assert not found.fits and "model.quantize = 'nf4'" in names
    assert not any("fp8" in name for name in names)


def test_a_short_run_does_not_wait_for_a_longer_first_step() -> None:
    request = request_of(buckets={IMAGE: 1.0}, micro_batches=16, may_launch_from_cpp=True)
    seconds = plan(replace(request, may_launch_from_cpp=False)).seconds_per_step
    steps = [int(share * LONG / seconds) for share in (0.9, 1.1)]
    assert [plan(replace(request, steps=n)).cpp_wrapper for n in steps] == [False, True]


def test_where_the_host_limits_what_is_gained_is_told() -> None:
    choice = choose(request_of(buckets={IMAGE: 1.0}, micro_batches=16, may_launch_from_cpp=True))
    (lost,), found = choice.lost, choice.plan
    assert found.cpp_wrapper and choice.planner.request.cpp_wrapper
    assert found == Planner(choice.planner.request).best(), "with norms as they are run then"
    assert lost.name == "kernels launched from Python"
    assert lost.seconds_per_step is not None and lost.seconds_per_step > 1.5 * found.seconds_per_step
    assert lost.reason.endswith("times the time of a clip")


@pytest.mark.parametrize("cards", ["1x H200", "2x H200"])
def test_cards_are_launched_from_cpp_only_where_they_wait_for_the_host(cards: str) -> None:
    clip = request_of(budgets=budgets_of(cards), may_launch_from_cpp=True)
    image = replace(clip, buckets={IMAGE: 1.0}, micro_batches=16)
    assert [plan(request).cpp_wrapper for request in (clip, image)] == [False, True]


def test_the_chosen_order_of_unlike_cards_stays_when_they_are_launched_from_cpp() -> None:
    request = request_of(
        budgets=budgets_of("H100 80GB, H200"), may_reorder=True, buckets={IMAGE: 1.0}, micro_batches=16
    )
    before, after = (plan(replace(request, may_launch_from_cpp=may)) for may in (False, True))
    assert after.cpp_wrapper and not before.cpp_wrapper
    assert [stage.device for stage in before.stages] == [stage.device for stage in after.stages]
