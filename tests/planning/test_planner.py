"""The planner's choices, and its figures beside those that two H100s measured (docs/benchmarks.md)."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
from real_models import CLIP, IMAGE, VARIANTS, budgets_of, limited, request_of, settings_of

from tworeel.data.clips import Bucket
from tworeel.engine.fitting import Fit
from tworeel.engine.residency import Residency
from tworeel.engine.weight_streaming import spread
from tworeel.planning import Planner, Request, plan
from tworeel.planning.measuring import LAUNCH
from tworeel.planning.planner import MOST_PLAYED
from tworeel.planning.plans import Plan
from tworeel.planning.timing import CPP_LAUNCH_SECONDS, PARKING_KERNELS
from tworeel.units import GIB

H100S = limited(budgets_of("2x H100 80GB"), 79.2)


def gib(found: Plan) -> list[float]:
    return [stage.peak / GIB for stage in found.stages]


def forced(request: Request, *residencies: tuple[int, Residency]) -> Plan:
    """The plan whose stages keep as many blocks as a measured run did."""
    planner = Planner(replace(request, split_at=(20,)))
    drafts = planner.drafts(request.budgets, (20,))
    decided = [
        draft.decide(Fit(kept, residency))
        for draft, (kept, residency) in zip(drafts, residencies, strict=True)
    ]
    return planner.assembled(request.budgets, decided)


@pytest.mark.parametrize(
    ("quantize", "kept", "peaks", "seconds"),
    [(None, (2, 13), (62.3, 71.1), 2.55), ("fp8", (3, 14), (65.7, 67.8), 2.10)],
)
def test_eight_clips_on_two_h100s_take_what_they_took(
    quantize: str | None, kept: tuple[int, int], peaks: tuple[float, ...], seconds: float
) -> None:
    trace = settings_of("wan2.2-t2v-a14b", quantize=quantize)
    found = forced(request_of(budgets=H100S, trace=trace), *((count, Residency.SELECTIVE) for count in kept))
    assert found.seconds_per_step / 8 == pytest.approx(seconds, rel=0.15)
    assert gib(found) == pytest.approx(peaks, rel=0.05)
    assert all(ours > 0.98 * theirs for ours, theirs in zip(gib(found), peaks, strict=True))


def test_two_cards_of_22_gib_park_and_stream_as_the_engine_did() -> None:
    found = plan(request_of(budgets=limited(H100S, 22.5), split_at=(20,)))
    assert found.fits
    assert [stage.residency for stage in found.stages] == [Residency.OFFLOAD_SELECTIVE] * 2
    assert 2 <= found.stages[0].streamed <= 6
    assert gib(found) == pytest.approx([21.6, 21.0], rel=0.03)
    assert found.host_memory / GIB == pytest.approx(37.3, rel=0.15)
    assert found.seconds_per_step / 8 == pytest.approx(3.17, rel=0.2)


def test_an_image_waits_for_the_host() -> None:
    """Measured at 1,536 tokens, on two H200s; here they are 1,024, which the host does not notice."""
    found = plan(request_of(buckets={IMAGE: 1.0}, micro_batches=16))
    assert found.host_bound and "the host" in found.limit
    assert found.seconds_per_step / 16 == pytest.approx(0.284, rel=0.15)


def test_launched_from_cpp_a_step_takes_the_launching_of_one_card() -> None:
    some = request_of(buckets={IMAGE: 1.0}, micro_batches=16)
    slow, fast = plan(some), plan(replace(some, cpp_wrapper=True))
    most = max(stage.kernels for stage in fast.stages)
    # Beside that, the pipeline fills.
    assert 1 <= fast.seconds_per_step / (16 * most * CPP_LAUNCH_SECONDS) < 17 / 16
    assert fast.seconds_per_step < 0.6 * slow.seconds_per_step


def test_launched_from_cpp_an_image_takes_what_was_measured() -> None:
    """Wan 14B, 1,024 tokens, two H200s: 0.143 seconds, and 0.171 on a machine with a slower host."""
    some = request_of(buckets={IMAGE: 1.0}, micro_batches=16, cpp_wrapper=True)
    for launching, seconds in ((1.0, 0.143), (6.7e-6 / LAUNCH, 0.171)):
        budgets = [replace(budget, launching=launching) for budget in budgets_of("2x H200")]
        found = plan(replace(some, budgets=tuple(budgets)))
        assert found.host_bound
        assert found.seconds_per_step / 16 == pytest.approx(seconds, rel=0.15)


def test_norms_are_planned_as_they_are_run_where_blocks_are_launched_from_cpp(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """They are generated there, see `tworeel.engine.compiling.takes_whole_norms`."""
    some = request_of(buckets={IMAGE: 1.0})
    (from_cpp,) = Planner(replace(some, cpp_wrapper=True)).trace.blocks.values()
    (inexact,) = Planner(replace(some, trace=replace(some.trace, exact=False))).trace.blocks.values()
    (plain,) = Planner(some).trace.blocks.values()
    assert from_cpp != plain, "its norms are generated"
    assert from_cpp != inexact, "it rounds as it does uncompiled"
    fp8 = replace(some, trace=replace(some.trace, quantize="fp8"))
    first = Planner(fp8)
    known = first.trace
    monkeypatch.setattr("tworeel.planning.planner.trace_model", None)
    assert Planner(replace(fp8, cpp_wrapper=True), like=first).trace == known, "with fp8 they always are"


@pytest.mark.parametrize(("size", "gains"), [(704, True), (768, False)])
def test_attentions_to_the_text_that_are_computed_again_are_launched_from_python(
    size: int, gains: bool
) -> None:
    """Over 1,936 tokens they are kept, over 2,304 not."""
    buckets = {Bucket(frames=1, height=size, width=size): 1.0}
    some = request_of(buckets=buckets, micro_batches=16, residency="selective", budgets=budgets_of("2x H200"))
    slow, fast = plan(some), plan(replace(some, cpp_wrapper=True))
    assert slow.host_bound and (fast.seconds_per_step < 0.8 * slow.seconds_per_step) == gains


def test_what_is_computed_again_is_launched_again() -> None:
    some = request_of(buckets={IMAGE: 1.0}, micro_batches=16)
    kept, again = (plan(replace(some, residency=name)) for name in ("keep", "recompute"))
    assert again.seconds_per_step / kept.seconds_per_step == pytest.approx(1.42, abs=0.05)


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_variant_is_planned(variant: str) -> None:
    found = plan(request_of(variant))
    assert found.fits and found.model == variant
    assert found.stages[-1].last == (39 if "14b" in variant else 29)


@pytest.mark.parametrize(
    ("gpus", "memory"),
    [("2x RTX 4090", None), ("RTX 4090, RTX 3060 12GB", None), ("2x H100 80GB", "22.5,15")],
)
def test_no_other_boundary_that_fits_is_faster(gpus: str, memory: str | None) -> None:
    request = request_of(budgets=budgets_of(gpus, memory))
    planner = Planner(request)
    best = planner.best()
    (chosen,) = best.split_at
    others = [
        Planner(replace(request, split_at=(at,)), planner.trace).best()
        for at in sorted({*range(2, 40, 4), chosen - 1, chosen + 1})
    ]
    assert best.fits and sum(other.fits for other in others) >= 2
    assert all(best.seconds_per_step <= other.seconds_per_step for other in others if other.fits)


def test_a_slower_card_gets_fewer_blocks() -> None:
    found = plan(request_of(budgets=budgets_of("RTX 4090, RTX 3060 12GB")))
    assert found.stages[0].num_blocks > 2 * found.stages[1].num_blocks


def test_unlike_cards_may_change_places() -> None:
    request = request_of(budgets=budgets_of("RTX 3060 12GB, RTX 4090"))
    fixed, free = plan(request), plan(replace(request, may_reorder=True))
    assert [stage.device for stage in fixed.stages] == ["cuda:0", "cuda:1"]
    assert free.seconds_per_step <= fixed.seconds_per_step


def test_blocks_are_all_there_once_with_four_stages() -> None:
    found = plan(request_of(budgets=budgets_of("4x RTX 4090")))
    positions = [range(stage.first, stage.last + 1) for stage in found.stages]
    assert list(itertools.chain(*positions)) == list(range(40))
    assert found.fits and max(found.busy) - min(found.busy) < 0.15


def test_smaller_clips_between_make_a_step_shorter_and_no_smaller() -> None:
    alone, mixed = (plan(request_of(buckets=buckets)) for buckets in ({CLIP: 1.0}, {CLIP: 1.0, IMAGE: 3.0}))
    assert mixed.seconds_per_step < 0.5 * alone.seconds_per_step
    assert gib(mixed) == gib(alone)


def test_what_does_not_fit_comes_with_changes_that_would() -> None:
    trace = settings_of("wan2.2-t2v-a14b", rank=64)
    clips = {Bucket(frames=33, height=480, width=832): 1.0}
    found = plan(request_of(budgets=budgets_of("RTX 3060 12GB"), trace=trace, buckets=clips))
    assert not found.fits and "cuda:0 would need" in found.limit
    names = [change.name for change in found.changes]
    assert any("frames" in name for name in names)
    assert "one more RTX 3060 12GB" in names
    assert all(change.fits for change in found.changes)


def test_where_streamed_weights_are_not_enough_attentions_are_computed_again() -> None:
    """14 B parameters in bf16, 49 frames, on 12 GB."""
    buckets = {CLIP: 1.0}
    (stage,) = plan(request_of(budgets=budgets_of("RTX 3060 12GB"), buckets=buckets)).stages
    assert stage.fits and stage.residency is Residency.OFFLOAD
    roomier = plan(request_of(budgets=budgets_of("RTX 4060 Ti 16GB"), buckets=buckets)).stages[0]
    assert roomier.fits and roomier.residency is Residency.OFFLOAD_SELECTIVE


def test_too_little_host_memory_is_told() -> None:
    found = plan(request_of(budgets=limited(H100S, 22.5), host_free=4 * GIB))
    assert not found.fits and "host memory would be pinned" in found.limit


@pytest.mark.parametrize("gpus", ["RTX 5090", "2x RTX 4090", "RTX 4090, RTX 3060 12GB", "3x RTX 4070"])
def test_more_host_memory_never_makes_a_plan_slower_or_stop_fitting(gpus: str) -> None:
    planner = Planner(request_of(budgets=budgets_of(gpus)))
    found = [
        Planner(replace(planner.request, host_free=gib * GIB), planner.trace, planner).best()
        for gib in range(4, 64, 2)
    ]
    fits, seconds = [one.fits for one in found], [one.seconds_per_step for one in found if one.fits]
    assert fits == sorted(fits) and any(fits) and not fits[0]
    assert seconds == sorted(seconds, reverse=True) and seconds[0] > seconds[-1]
    assert all(one.host_memory <= one.host_free for one in found if one.fits)


def test_little_host_memory_is_spent_on_what_fits_in_it() -> None:
    """49 frames in bf16 on one card: the inputs are parked, or more weights streamed where nothing is."""
    planner = Planner(request_of(budgets=budgets_of("RTX 5090")))
    some, more = (
        Planner(replace(planner.request, host_free=gib * GIB), planner.trace, planner).best().stages[0]
        for gib in (16, 30)
    )
    assert some.residency is Residency.OFFLOAD and more.residency is Residency.OFFLOAD_SELECTIVE
    assert some.fits and some.host <= 16 * GIB < more.host
    assert 0 < some.streamed < more.streamed


def test_weights_are_streamed_beside_a_residency_that_is_set() -> None:
    found = plan(request_of(budgets=budgets_of("2x RTX 4090"), residency="offload-selective"))
    assert found.fits and found.num_streamed > 0
    assert {stage.residency for stage in found.stages} == {Residency.OFFLOAD_SELECTIVE}


def test_parking_takes_time_of_the_host() -> None:
    parked, kept = (
        plan(request_of(buckets={IMAGE: 1.0}, budgets=budgets_of("2x H200"), residency=residency))
        for residency in ("offload-selective", "selective")
    )
    blocks = [stage.num_blocks for stage in kept.stages]
    for one, other, count in zip(parked.stages, kept.stages, blocks, strict=True):
        assert one.num_blocks == count and one.kernels == other.kernels + PARKING_KERNELS * count
    assert parked.host_bound and kept.host_bound and parked.seconds_per_step > kept.seconds_per_step


def test_a_slow_link_makes_each_block_that_parks_wait_for_its_copy_and_no_other() -> None:
    link, count = 1e9, 20
    budgets = [replace(budget, rates=budget.rates.linked(link)) for budget in H100S]
    some = request_of(budgets=budgets)
    draft = Planner(some).drafts(budgets, (count,))[0]
    computing = draft.decide(Fit(5, Residency.SELECTIVE))
    everything = draft.decide(Fit(count, Residency.SELECTIVE))
    parking = draft.decide(Fit(5, Residency.OFFLOAD_SELECTIVE))
    block, copies = draft.traces[0], count - 5
    copy = block.footprints[Residency.SELECTIVE].kept / link
    assert computing.forward < 0.5 * copies * copy
    assert parking.forward == pytest.approx(copies * copy + 5 / count * everything.forward)
    assert parking.backward == pytest.approx(copies * copy + 5 / count * everything.backward)


def test_a_slot_whose_copies_limit_is_named() -> None:
    fast = budgets_of("2x RTX 4090")
    slow = (fast[0], replace(fast[1], rates=fast[1].rates.linked(5e8)))
    before, found = (plan(request_of(budgets=budgets, split_at=(20,))) for budgets in (fast, slow))
    assert "copies" not in before.limit and all(stage.copying < 1.1 for stage in before.stages)
    assert found.limit.startswith("copies between cuda:1 and host memory, with which it takes ")
    assert found.stages[1].copying > 1.1 and found.seconds_per_step > before.seconds_per_step


def test_weights_come_while_activations_leave_and_wait_where_these_come_too() -> None:
    link, count = 1e9, 20
    budgets = [replace(budget, rates=budget.rates.linked(link)) for budget in H100S]
    draft = Planner(request_of(budgets=budgets)).drafts(budgets, (count,))[0]
    copies = count * draft.traces[0].footprints[Residency.SELECTIVE].kept / link
    for streamed in (2, count):
        weights = sum(spread(draft.sizes, streamed)) / link
        found = draft.decide(Fit(0, Residency.OFFLOAD_SELECTIVE, streamed))
        assert found.forward == pytest.approx(max(copies, weights))
        assert found.backward == pytest.approx(copies + weights)


def test_an_optimizer_that_keeps_less_takes_less() -> None:
    trace = settings_of("wan2.2-t2v-a14b", rank=128)
    usual, small = (plan(request_of(trace=trace, moments=moments)) for moments in (2.0, 0.5))
    lora = "LoRA, gradients, optimizer"
    usual_bytes, small_bytes = (sum(stage.parts[lora] for stage in one.stages) for one in (usual, small))
    assert small_bytes == pytest.approx(usual_bytes * 2.5 / 4, rel=1e-6)


def test_a_peak_is_the_sum_of_its_parts_and_a_card_what_is_free_on_it_and_what_cuda_takes() -> None:
    first, second = plan(request_of(budgets=budgets_of("2x RTX 4090"))).stages
    names = [
        "weights",
        "LoRA, gradients, optimizer",
        "activations",
        "workspace",
        "crossing buffers",
        "inputs",
    ]
    for stage in (first, second):
        assert list(stage.parts) == names and sum(stage.parts.values()) == stage.peak
        assert all(size > 0 for size in stage.parts.values())
        assert stage.context is not None and stage.free + stage.context == 24 * GIB


@pytest.mark.parametrize("slack", [0, 1, 3])
def test_hidden_states_that_cross_wait_for_their_turn_on_either_side(slack: int) -> None:
    """On the first stage gradients, but of the one at work, and one that leaves; on the last one inputs."""
    request = request_of(slack=slack, residency="recompute")
    hidden = Planner(request).trace.blocks["blocks"].footprints[Residency.KEEP].hidden
    first, last = plan(request).stages
    assert first.parts["crossing buffers"] == (first.in_flight - 1 + 1) * hidden
    assert last.parts["crossing buffers"] == (first.in_flight - last.in_flight) * hidden


def test_stages_that_share_a_card_have_equal_parts_of_what_cuda_takes() -> None:
    found = plan(request_of(budgets=budgets_of("RTX 4090"), stages_per_device=2))
    held = [stage.free + (stage.context or 0) for stage in found.stages]
    assert held == pytest.approx([12 * GIB] * 2, abs=2)
    assert [stage.shared for stage in found.stages] == [2, 2]


def test_weights_that_are_only_stored_so_are_traced_as_bf16_that_rounds_where_a_kernel_ends() -> None:
    first = Planner(request_of())
    stored = replace(first.request, trace=replace(first.request.trace, quantize="nf4"))
    inexact = replace(first.request, trace=replace(first.request.trace, exact=False))
    assert Planner(stored, like=first).trace == Planner(inexact, like=first).trace != first.trace


def test_explained_alternatives_are_no_better() -> None:
    found = plan(request_of(budgets=budgets_of("2x RTX 4090"), clips_per_epoch=64), explain=True)
    named = {one.name: one for one in found.alternatives}
    assert "keep all activations" in named and not named["keep all activations"].fits
    assert "does not fit" in named["keep all activations"].reason
    assert "8-bit weights (fp8)" in named
    same = [one for name, one in named.items() if name in ("recompute every block", "no slack")]
    assert all(one.seconds_per_step >= found.seconds_per_step for one in same if one.fits)


def test_one_more_small_card_fits_too_where_the_host_has_little_memory() -> None:
    """The boundaries that it has memory for are far from even shares: of one of the cards, few blocks."""
    planner = Planner(request_of(budgets=budgets_of("2x RTX 3060 12GB"), host_free=int(36.5 * GIB)))
    more = replace(planner.request, budgets=budgets_of("3x RTX 3060 12GB"))
    two, three = planner.best(), Planner(more, planner.trace, planner).best()
    assert two.fits and three.fits and three.seconds_per_step < two.seconds_per_step


def test_a_step_of_very_many_clips_is_planned_as_soon_as_one_of_some() -> None:
    some = request_of(micro_batches=MOST_PLAYED)
    planner = Planner(some)
    seconds = planner.best().seconds_per_step
    found = Planner(replace(some, micro_batches=100 * MOST_PLAYED), planner.trace, planner).best()
    assert found.seconds_per_step == pytest.approx(100 * seconds, rel=0.01)
    assert max(found.busy) == pytest.approx(1, abs=0.001) and found.peaks == planner.best().peaks


def test_what_is_set_is_kept() -> None:
    found = plan(request_of(split_at=(13,), residency="recompute", streamed=(2, 0)))
    assert found.split_at == (13,)
    assert [stage.residency for stage in found.stages] == [Residency.RECOMPUTE] * 2
    assert [stage.streamed for stage in found.stages] == [2, 0]


@pytest.mark.parametrize(("gpus", "streamed"), [("2x H100 80GB", (30, 6)), ("4x H100 80GB", (9, 0, 3, 0))])
def test_each_stage_has_the_blocks_that_it_is_to_stream(gpus: str, streamed: tuple[int, ...]) -> None:
    found = plan(request_of(budgets=budgets_of(gpus), split_at=None, streamed=streamed))
    assert [stage.streamed for stage in found.stages] == list(streamed)
    assert all(stage.num_blocks >= stage.streamed for stage in found.stages)


def test_more_streamed_blocks_than_a_stage_has_are_told() -> None:
    with pytest.raises(ValueError, match="stage 0 has 13 blocks"):
        plan(request_of(split_at=(13,), streamed=(14, 0)))


def test_boundaries_that_cannot_be_are_told() -> None:
    with pytest.raises(ValueError, match="boundaries must rise"):
        plan(request_of(split_at=(40,)))


@pytest.mark.parametrize(
    ("quantize", "gpus", "compile", "copies"),
    [
        ("nf4", "2x H100 80GB", True, 1),
        ("nf4", "2x H100 80GB", False, 1),
        ("fp8", "2x RTX 3090", True, 1),
        ("fp8", "2x H100 80GB", True, 0),
        # The operations that are followed have made it already.
        ("fp8", "2x RTX 3090", False, 0),
        (None, "2x RTX 3090", True, 0),
    ],
)
def test_a_weight_that_is_dequantized_for_its_use_has_room(
    quantize: str | None, gpus: str, compile: bool, copies: int
) -> None:
    trace = settings_of("wan2.2-t2v-a14b", quantize=quantize, compile=compile)
    planner = Planner(request_of(budgets=budgets_of(gpus), trace=trace))
    drafts = planner.drafts(planner.request.budgets, (20,))
    # The feed-forward's, in bf16
    assert [draft.dequantized for draft in drafts] == [copies * 2 * 5120 * 13824] * 2


def test_longer_clips_take_more() -> None:
    lengths = [Bucket(frames=frames, height=480, width=832) for frames in (17, 49, 81)]
    found = [plan(request_of(buckets={bucket: 1.0}, residency="recompute")) for bucket in lengths]
    assert gib(found[0]) < gib(found[1]) < gib(found[2])
    assert found[0].seconds_per_step < found[1].seconds_per_step < found[2].seconds_per_step


def test_a_plan_is_plain_values_as_json() -> None:
    found = plan(request_of()).as_json()
    assert found["fits"] is True and found["split_at"] and set(found["peaks"]) == {"cuda:0", "cuda:1"}


def test_a_device_of_several_stages_holds_less_than_they_would_each_at_its_own_peak() -> None:
    wide = plan(request_of(budgets=budgets_of("2x H200"), stages_per_device=2))
    together = dict.fromkeys(wide.devices, 0)
    for stage in wide.stages:
        together[stage.device] += stage.peak
    assert wide.fits and set(wide.apart) == set(together)
    for device, peak in wide.peaks.items():
        workspace = min(s.parts["workspace"] for s in wide.stages if s.device == device)
        assert workspace < together[device] - peak < 0.5 * together[device], "one works at a time"
    assert not plan(request_of(budgets=budgets_of("2x H200"))).apart
