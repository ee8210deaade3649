"""As much as fits is kept: the choice by numbers. Measuring it needs an accelerator (tests/gpu)."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import torch
from toy_wan import make_wan

from tworeel import split
from tworeel.engine import fitting, place
from tworeel.engine.fitting import (
    FALLBACKS,
    Fit,
    StageMemory,
    available_memory,
    fit_as,
    fit_stages,
    needs_fallback,
    ways_to_fit,
)
from tworeel.engine.footprints import TOO_LARGE, Footprint, StageFootprints
from tworeel.engine.residency import Residency
from tworeel.engine.schedule import Held
from tworeel.engine.weight_streaming import SLOTS, Streamed, more_and_more_streamed, pinned_bytes

BLOCK = {
    Residency.KEEP: Footprint(kept=20, working=10, hidden=1),
    Residency.SELECTIVE: Footprint(kept=3, working=30, hidden=1),
}
SIZES = StageFootprints([BLOCK] * 10)


def memory(available: int, **changes: Any) -> StageMemory:
    """A stage of 10 blocks that holds 2 micro-batches."""
    held = {key: changes.pop(key) for key in Held._fields if key in changes}
    held = Held(**{"in_flight": 2, "given": 2, "waiting": 3} | held)
    return replace(StageMemory(available=available, num_blocks=10, may_keep=10, held=held), **changes)


def fit_stage(memory: StageMemory, footprints: StageFootprints) -> Fit:
    """Whatever it takes of the host."""
    return ways_to_fit(memory, footprints)[0]


def test_with_room_for_everything_everything_is_kept():
    assert fit_stage(memory(413), SIZES) == Fit(10, Residency.SELECTIVE)
    assert not needs_fallback(memory(413), BLOCK[Residency.KEEP])
    assert needs_fallback(memory(412), BLOCK[Residency.KEEP])


def test_with_less_room_some_blocks_recompute():
    # 2 × (5 × 20 + 5 × 3) + 3 × 1 + 10: where a block recomputes, those that keep are through
    assert fit_stage(memory(243), SIZES) == Fit(5, Residency.SELECTIVE)
    assert fit_stage(memory(242), SIZES) == Fit(4, Residency.SELECTIVE)
    # 2 × 10 × 3 + 3 × 1 + 30
    assert fit_stage(memory(93), SIZES) == Fit(0, Residency.SELECTIVE)


def test_what_blocks_keep_is_still_there_when_a_streamed_one_behind_them_recomputes():
    # 2 × (2 × 20 + 8 × 3) + 3 × 1 + 30, of which the kept block behind the streamed one is through: 20
    assert fit_stage(memory(141, may_keep=2, last_streamed=8), SIZES) == Fit(2, Residency.SELECTIVE)
    assert fit_stage(memory(140, may_keep=2, last_streamed=8), SIZES) == Fit(1, Residency.SELECTIVE)
    # 2 × (20 + 9 × 3) + 3 × 1 + 30
    assert fit_stage(memory(127, may_keep=1, last_streamed=9), SIZES) == Fit(1, Residency.SELECTIVE)
    assert fit_stage(memory(126, may_keep=1, last_streamed=9), SIZES) == Fit(0, Residency.SELECTIVE)


def test_the_head_needs_its_room_while_everything_is_kept():
    # 2 × 10 × 20 + 3 × 1 + 25
    assert fit_stage(memory(428, head=25), SIZES) == Fit(10, Residency.SELECTIVE)
    assert fit_stage(memory(427, head=25), SIZES) == Fit(9, Residency.SELECTIVE)
    assert fit_stage(memory(413, head=10), SIZES) == Fit(10, Residency.SELECTIVE), "less than a block's work"


def test_with_little_room_activations_wait_on_the_host():
    # 2 × 20 + 3 × 1 + 2 × 3 + 10 with a block that keeps, 3 × 1 + 2 × 3 + 30 without
    assert fit_stage(memory(59), SIZES) == Fit(1, Residency.OFFLOAD_SELECTIVE)
    assert fit_stage(memory(58), SIZES) == Fit(0, Residency.OFFLOAD_SELECTIVE)
    assert fit_stage(memory(39), SIZES) == Fit(0, Residency.OFFLOAD_SELECTIVE)


def test_what_is_missing_is_told_as_long_as_streamed_weights_can_make_up_for_it():
    weights = {"streaming": more_and_more_streamed([1] * 10)}
    assert fit_stage(memory(36, **weights), SIZES) == Fit(0, Residency.OFFLOAD_SELECTIVE, streamed=5)


def test_with_less_still_the_attentions_are_computed_again_too():
    # 3 × 1 + 2 × 1 + 30: an input each is on the device, and what `keep` would have kept is made again
    few = {"streaming": [Streamed(freed=more // 5) for more in range(11)]}
    assert fit_stage(memory(36, **few), SIZES) == Fit(0, Residency.OFFLOAD)
    assert fit_stage(memory(35), SIZES) == Fit(0, Residency.OFFLOAD)
    assert fit_stage(memory(33), SIZES) == Fit(0, Residency.OFFLOAD, missing=2)


def test_what_is_known_of_recomputing_counts():
    known = {**BLOCK, Residency.RECOMPUTE: Footprint(kept=1, working=40, hidden=1)}
    inputs = StageFootprints([known] * 10).inputs_only()
    assert fit_as(Residency.OFFLOAD, memory(38), inputs) == Fit(0, Residency.OFFLOAD, missing=7)


def test_what_fits_in_no_way_is_fitted_in_the_way_that_is_nearest():
    known = {**BLOCK, Residency.RECOMPUTE: Footprint(kept=1, working=40, hidden=1)}
    assert fit_stage(memory(38), StageFootprints([known] * 10)) == Fit(
        0, Residency.OFFLOAD_SELECTIVE, missing=1
    )


def test_where_keeping_could_not_be_measured_the_selective_way_counts():
    large = StageFootprints([{**BLOCK, Residency.KEEP: TOO_LARGE}] * 10)
    # 3 × 1 + 2 × 1 + 32
    assert fit_stage(memory(37), large) == Fit(0, Residency.OFFLOAD)
    assert fit_stage(memory(36), large) == Fit(0, Residency.OFFLOAD, missing=1)


def test_inputs_alone_are_what_an_offloading_stage_parks():
    memories = [memory(38), memory(39)]
    parked = 2 * 10 * 1 + 2 * 10 * 3
    for limit, second in ((parked, Residency.OFFLOAD_SELECTIVE), (parked - 1, Residency.OFFLOAD)):
        found = fit_stages(memories, [SIZES, SIZES], limit)
        assert [fit.fallback for fit in found] == [Residency.OFFLOAD, second]


def test_more_micro_batches_in_flight_leave_room_for_less():
    shallow, deep = (fit_stage(memory(264, in_flight=n), SIZES).num_kept for n in (1, 3))
    assert shallow > deep


def test_inputs_that_wait_for_their_turn_leave_room_for_less():
    """TI2V-5B modulates each token: a micro-batch's modulation is six hidden states."""
    assert fit_stage(memory(413 + 1 + 3 * 6, inputs=6, given=3, waiting=4), SIZES).num_kept == 10
    assert fit_stage(memory(413 + 3 * 6, inputs=6, given=3, waiting=4), SIZES).num_kept < 10


def test_blocks_with_streamed_weights_never_keep():
    assert fit_stage(memory(10_000, may_keep=4), SIZES) == Fit(4, Residency.SELECTIVE)
    assert needs_fallback(memory(10_000, may_keep=4), BLOCK[Residency.KEEP])


def test_what_all_stages_park_has_to_fit_the_host():
    memories, footprints = [memory(48), None, memory(48)], [SIZES, StageFootprints([]), SIZES]
    parked = 2 * 2 * 10 * 3
    selective = Fit(0, Residency.OFFLOAD_SELECTIVE)
    assert fit_stages(memories, footprints, parked) == [selective, None, selective]
    assert fit_stages(memories, footprints, None) == [selective, None, selective]
    inputs = Fit(0, Residency.OFFLOAD)
    assert fit_stages(memories, footprints, parked - 1) == [inputs, None, selective]
    assert fit_stages(memories, footprints, parked - 2 * 10 * 2 - 1) == [inputs, None, inputs]


WEIGHTS = {"streaming": more_and_more_streamed([9] * 10)}


def test_streamed_weights_take_of_the_host_too():
    fit = fit_stage(memory(36, **WEIGHTS), SIZES)
    assert (fit.fallback, fit.streamed) == (Residency.OFFLOAD_SELECTIVE, SLOTS + 1)
    assert fit.host == 2 * 10 * 3 + pinned_bytes([9] * (SLOTS + 1))
    for limit, fits in ((fit.host, True), (fit.host - 1, False)):
        assert (fit_stages([memory(36, **WEIGHTS)], [SIZES], limit) == [fit]) == fits


def test_weights_that_wait_on_the_host_already_take_nothing_more_of_it():
    others = more_and_more_streamed([9] * (9 - SLOTS), streamed=SLOTS + 1, slot=9)
    before = memory(36, streamed=SLOTS + 1, may_keep=9 - SLOTS, streaming=others)
    fit = fit_stage(before, SIZES)
    assert fit.streamed == SLOTS + 2 and fit.host == 2 * 10 * 3 + pinned_bytes([9])


def test_each_way_to_fit_is_leaner_on_the_host_and_fits_by_itself():
    for available in range(20, 420, 10):
        known = memory(available, **WEIGHTS)
        found = ways_to_fit(known, SIZES)
        assert all(before.host > after.host for before, after in itertools.pairwise(found))
        assert len(found) == 1 or not any(fit.missing for fit in found)


def test_what_is_kept_is_chosen_anew_where_less_is_parked():
    # 2 × 20 + 3 × 1 + 2 × 3 + 10 and one that keeps does not fit; 2 × 20 + 3 × 1 + 2 × 1 + 32 − 20 does
    selective, inputs, *_ = ways_to_fit(memory(58), SIZES)
    assert selective == Fit(0, Residency.OFFLOAD_SELECTIVE) and inputs == Fit(1, Residency.OFFLOAD)


def test_with_next_to_nothing_of_the_host_attentions_are_computed_again_on_the_device():
    # 2 × 10 × 1 + 3 × 1 + 30
    (fit,) = fit_stages([memory(55)], [SIZES], 0)
    assert fit == Fit(0, Residency.RECOMPUTE) and fit.host == 0


def test_more_of_the_host_never_makes_a_stage_leave_behind_less():
    memories, footprints = [memory(40, **WEIGHTS), memory(55, **WEIGHTS)], [SIZES, SIZES]
    found = [fit_stages(memories, footprints, limit) for limit in range(0, 300)]
    places = [[FALLBACKS.index(fit.fallback) for fit in fits] for fits in found]
    assert all(
        a >= b for before, after in itertools.pairwise(places) for a, b in zip(before, after, strict=True)
    )
    hosts = [sum(fit.host for fit in fits) for fits in found]
    least = min(hosts)
    assert all(host <= max(limit, least) for limit, host in enumerate(hosts))


def test_room_is_left_for_gradients_and_moments_that_are_still_to_come(monkeypatch):
    monkeypatch.setattr(fitting, "total_and_free", lambda device: (0, 10**6))
    model = make_wan("t2v", torch.float32)
    lora = [parameter for parameter in model.parameters() if parameter.requires_grad]
    placement, trained = place(model, ["cpu"]), sum(parameter.nbytes for parameter in lora)

    def taken(optimizer: torch.optim.Optimizer | None) -> int:
        return 10**6 - available_memory(placement, model, 0, optimizer)

    optimizer = torch.optim.AdamW(lora)
    assert taken(None) == taken(optimizer) == 3 * trained
    for parameter in lora:
        parameter.grad = torch.ones_like(parameter)
    assert taken(None) == taken(optimizer) == 2 * trained
    optimizer.step()
    resumed = torch.optim.AdamW(lora)
    resumed.load_state_dict(optimizer.state_dict())
    assert taken(optimizer) == taken(resumed) == 0
    optimizer.zero_grad()
    assert taken(optimizer) == trained and taken(None) == 3 * trained


def test_on_a_cpu_auto_recomputes():
    division = split(make_wan("t2v", torch.float32), ["cpu", "cpu"], residency="auto")
    assert not division.is_auto
    assert division.residency_in_words() == "stage 0: 2 recompute; stage 1: 3 recompute"


LARGE = {
    Residency.KEEP: Footprint(kept=50, working=25, hidden=2),
    Residency.SELECTIVE: Footprint(kept=8, working=70, hidden=2),
}
"""A block of another kind, as the double blocks before FLUX's single ones are."""
MIXED = StageFootprints([LARGE] * 4 + [BLOCK] * 6)


def test_blocks_of_each_kind_count_as_what_they_are():
    # 2 × (4 × 50 + 6 × 20) + 3 × 2 + 25
    assert fit_stage(memory(671), MIXED) == Fit(10, Residency.SELECTIVE)
    # 2 × (4 × 8 + 6 × 20) + 3 × 2 + 10: the large ones come first, and work when the others are through
    assert fit_stage(memory(320), MIXED) == Fit(6, Residency.SELECTIVE)
    # 3 × 2 + 2 × 8 + 70
    assert fit_stage(memory(92), MIXED) == Fit(0, Residency.OFFLOAD_SELECTIVE)
    # 3 × 2 + 2 × 2 + 75, by the large ones
    assert fit_stage(memory(91), MIXED) == fit_stage(memory(85), MIXED) == Fit(0, Residency.OFFLOAD)
    assert fit_stage(memory(84), MIXED) == Fit(0, Residency.OFFLOAD, missing=1)


def test_what_is_parked_is_summed_over_the_kinds():
    parked = 2 * (4 * 8 + 6 * 3)
    for limit, residency in ((parked, Residency.OFFLOAD_SELECTIVE), (parked - 1, Residency.OFFLOAD)):
        assert fit_stages([memory(100)], [MIXED], limit) == [Fit(0, residency)]


def test_with_several_kinds_each_is_measured_in_both_ways():
    assert needs_fallback(memory(10_000, num_kinds=2), BLOCK[Residency.KEEP])
