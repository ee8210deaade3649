"""FLUX.2 has blocks of two kinds: both are traced, and plans count each as what it is."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import Any

import pytest
from real_models import budgets_of, limited, request_of
from test_tracing import assert_holds

from tworeel.benchmarks.widths import FLUX2_DEV
from tworeel.data.clips import Bucket
from tworeel.engine.residency import Residency
from tworeel.engine.weight_streaming import pinned_bytes, spread
from tworeel.lora.targets import find_targets
from tworeel.models.family import Component, ModelSource
from tworeel.models.flux2.family import FLUX2
from tworeel.models.flux2.variants import traits
from tworeel.planning.changing import changes
from tworeel.planning.choosing import choose
from tworeel.planning.planner import Planner
from tworeel.planning.plans import Plan
from tworeel.planning.requests import Request
from tworeel.planning.traces import ModelTrace, TraceSettings
from tworeel.planning.tracing import trace_model
from tworeel.units import GIB

DOUBLE, SINGLE = FLUX2.block_lists
SQUARE = Bucket(1, 1024, 1024)
EDIT = Bucket(1, 1024, 1024, ((1024, 1024),))
IMAGE, TEXT = 64 * 64, 512
WIDTH = 4096
CONFIG: dict[str, Any] = {
    "num_layers": 8,
    "num_single_layers": 24,
    "num_attention_heads": 32,
    "joint_attention_dim": 12288,
    "guidance_embeds": False,
}
"""FLUX.2-klein-9B."""


def source_of() -> ModelSource:
    transformer = Component(files=(), layout="diffusers", config={"in_channels": 128, **CONFIG})
    return ModelSource(traits=traits("flux2-klein-9b"), transformer=transformer)


@cache
def settings_of() -> TraceSettings:
    model = FLUX2.build_transformer(source_of().transformer)
    return TraceSettings(
        targets=tuple(find_targets(model, FLUX2.lora_presets["all-linear"], FLUX2.block_lists))
    )


@cache
def traced(bucket: Bucket = SQUARE, compile: bool = True) -> ModelTrace:
    return trace_model(FLUX2, source_of(), bucket, replace(settings_of(), compile=compile))


# In hidden states, on an H200 with torch 2.11: what blocks keep, and the most that they take with that. The
# most of a double one that is compiled and selective is of the code that torch 2.13 generates. By that code a
# single one that keeps everything takes 38.1.
@pytest.mark.parametrize(
    ("name", "compile", "keep", "selective", "over"),
    [
        (DOUBLE, False, (22.36, 27.91), (2.02, 28.91), 0.1),
        (DOUBLE, True, (19.36, 32.91), (2.02, 31.87), 0.05),
        (SINGLE, False, (21.17, 34.20), (2.02, 34.20), 0.1),
        (SINGLE, True, (18.17, 34.21), (2.02, 41.1), 0.13),
    ],
)
def test_a_block_holds_what_it_held_on_an_h200(
    name: str, compile: bool, keep: tuple[float, float], selective: tuple[float, float], over: float
) -> None:
    block = traced(compile=compile).blocks[name]
    assert_holds(block, {Residency.KEEP: keep, Residency.SELECTIVE: selective}, over)


# Of the code that torch 2.13 generates for an H100.
@pytest.mark.parametrize(
    ("name", "residency", "most"),
    [
        (DOUBLE, Residency.KEEP, 36.21),
        (DOUBLE, Residency.SELECTIVE, 35.48),
        (SINGLE, Residency.KEEP, 33.14),
        (SINGLE, Residency.SELECTIVE, 42.19),
    ],
)
def test_a_block_in_8_bits_holds_what_its_kernels_write(name: str, residency: Residency, most: float) -> None:
    settings = replace(settings_of(), quantize="fp8", mode="rowwise")
    found = trace_model(FLUX2, source_of(), SQUARE, settings).blocks[name].footprints[residency]
    assert (found.kept + found.working) / found.hidden == pytest.approx(most, rel=0.03)


def klein(**changes: Any) -> Request:
    usual = {"family": FLUX2, "source": source_of(), "buckets": {SQUARE: 1.0}, "trace": settings_of()}
    return request_of(**{**usual, **changes})


def plan(gpus: str, **changes: Any) -> Plan:
    request = klein(budgets=budgets_of(gpus), **changes)
    return Planner(request, traced(max(request.buckets))).best()


@pytest.mark.parametrize("compile", [True, False])
def test_operations_of_both_kinds_are_those_of_the_formula(compile: bool) -> None:
    blocks = traced(compile=compile).blocks
    # A double block has 13 D² weights for each of its streams, a single one 13 D² for both.
    for name, tokens in ((DOUBLE, IMAGE + TEXT), (SINGLE, IMAGE + TEXT)):
        forward = blocks[name].forward
        # The formula leaves out the LoRA, which is about 1 %.
        assert sum(forward.products.values()) == pytest.approx(2 * tokens * 13 * WIDTH**2, rel=0.03)
        assert forward.attention == pytest.approx(4 * tokens**2 * WIDTH, rel=1e-6)


def test_blocks_of_both_kinds_hand_on_the_same_bytes_and_keep_different_ones() -> None:
    double, single = (traced().blocks[name].footprints for name in (DOUBLE, SINGLE))
    for footprints in (double, single):
        assert footprints[Residency.KEEP].hidden == 2 * (IMAGE + TEXT) * WIDTH
        assert footprints[Residency.RECOMPUTE].kept < footprints[Residency.SELECTIVE].kept
        assert footprints[Residency.SELECTIVE].kept < footprints[Residency.KEEP].kept
    assert double[Residency.KEEP].kept != single[Residency.KEEP].kept


def test_reference_images_are_counted() -> None:
    plain, edit = (traced(bucket).blocks[SINGLE] for bucket in (SQUARE, EDIT))
    share = (2 * IMAGE + TEXT) / (IMAGE + TEXT)
    assert sum(edit.forward.products.values()) == pytest.approx(
        share * sum(plain.forward.products.values()), rel=1e-3
    )
    assert plan("2x RTX 4090", buckets={EDIT: 1.0}).tokens == 2 * IMAGE


@pytest.mark.parametrize("side", [256, 512])
def test_small_images_among_large_ones_take_as_long_as_by_their_own_trace(side: int) -> None:
    """Each has its caption's tokens, too."""
    small = Bucket(1, side, side)
    rates, mixed = budgets_of("RTX 4090")[0].rates, Planner(klein(buckets={SQUARE: 1.0, small: 9.0}))

    def seconds(bucket: Bucket) -> float:
        return sum(
            rates.forward(b.forward) + rates.backward(b.backward) for b in traced(bucket).blocks.values()
        )

    of_largest = traced(SQUARE).blocks.values()
    planned = sum(
        rates.forward(mixed.means.of(b.forward)) + rates.backward(mixed.means.of(b.backward))
        for b in of_largest
    )
    assert planned == pytest.approx(0.1 * seconds(SQUARE) + 0.9 * seconds(small), rel=0.03)
    even = Planner(klein(buckets={SQUARE: 1.0, small: 1.0}))
    longer = even.longer_than_average({SQUARE: 1.0})
    assert longer == pytest.approx(2 * seconds(SQUARE) / (seconds(SQUARE) + seconds(small)), rel=0.05)


def test_a_resolution_that_is_proposed_fits_when_it_is_planned() -> None:
    large = Bucket(1, 2048, 2048)
    request = klein(budgets=budgets_of("2x RTX 3060 12GB"), buckets={large: 1.0}, host_free=8 * GIB)
    (found,) = [change for change in changes(Planner(request)) if change.name.endswith("(data.resolution)")]
    width, height = map(int, found.name.split()[:3:2])
    again = Planner(replace(request, buckets={Bucket(1, height, width): 1.0})).best()
    assert again.fits and again.seconds_per_step == found.seconds_per_step
    assert tuple(stage.peak for stage in again.stages) == found.peaks


def test_a_plan_covers_both_lists() -> None:
    found = plan("2x RTX 4090")
    assert found.fits
    assert (found.stages[0].first, found.stages[-1].last) == (0, 31)
    # Double blocks hold twice the weights of single ones.
    assert found.stages[0].num_blocks < found.stages[1].num_blocks
    assert all(stage.peak < 24 * GIB for stage in found.stages)


def test_images_of_dev_take_what_they_took_on_two_h200s() -> None:
    """512 × 512, eight a step, 22.5 GiB a card: the host limits."""
    source = ModelSource(
        traits=traits("flux2-dev"),
        transformer=Component(files=(), layout="diffusers", config=FLUX2_DEV.config()),
    )
    model = FLUX2.build_transformer(source.transformer)
    targets = tuple(find_targets(model, FLUX2.lora_presets["all-linear"], FLUX2.block_lists))
    request = request_of(
        family=FLUX2,
        source=source,
        trace=TraceSettings(targets=targets, rank=16, quantize="fp8"),
        buckets={Bucket(1, 512, 512): 1.0},
        budgets=limited(budgets_of("2x H200"), 22.5),
        split_at=(25,),
    )
    planner = Planner(request)
    found = planner.best()
    assert found.host_bound
    assert found.seconds_per_step / 8 == pytest.approx(0.268, rel=0.15)
    blocks = planner.trace.blocks
    shortened = [(blocks[DOUBLE], 2), (blocks[SINGLE], 12)]
    kernels = sum(count * (one.forward.kernels + one.backward.kernels) for one, count in shortened)
    assert kernels == pytest.approx(1446, rel=0.03)  # seen on H200s: 1,424 to 1,468
    from_cpp = replace(request, cpp_wrapper=True)
    wider = replace(from_cpp, budgets=limited(budgets_of("2x H200"), 30))
    for one, seconds in ((from_cpp, 0.174), (wider, 0.158)):
        known = Planner(one, like=planner).best()
        assert known.seconds_per_step / 8 == pytest.approx(seconds, rel=0.15)


def test_kernels_are_not_launched_from_cpp_where_only_python_launches_what_fits() -> None:
    """From C++ a single block that is selective takes a hidden state more."""
    request = klein(
        buckets={SQUARE: 1.0},
        micro_batches=8,
        may_launch_from_cpp=True,
        steps=10**6,
        residency="selective",
        streamed=(0, 0),
        split_at=(16,),
        budgets=budgets_of("2x H100 80GB"),
    )
    from_python, from_cpp = (Planner(replace(request, cpp_wrapper=way)).best() for way in (False, True))
    most, more = (max(one.stages, key=lambda stage: stage.peak) for one in (from_python, from_cpp))
    assert most.peak < more.peak
    tight = tuple(replace(b, free=(most.peak + more.peak) // 2 + most.spare) for b in request.budgets)
    found = choose(replace(request, budgets=tight)).plan
    assert found.fits and not found.cpp_wrapper
    assert choose(request).plan.fits


def test_a_small_card_streams_or_recomputes() -> None:
    found = plan("RTX 4090")
    assert found.fits
    assert found.stages[0].streamed > 0 or found.stages[0].kept < found.stages[0].num_blocks


def test_streamed_blocks_of_two_kinds_are_counted_each_as_it_is() -> None:
    """A double block is twice a single one, and of the 32 there are 8."""
    small = Bucket(1, 512, 512)
    some = request_of(
        family=FLUX2,
        source=source_of(),
        trace=settings_of(),
        buckets={small: 1.0},
        budgets=budgets_of("RTX 3060 12GB"),
        micro_batches=1,
        host_free=20 * GIB,
    )
    planner = Planner(some)
    found = planner.best()
    (stage,), (draft,) = found.stages, planner.drafts(some.budgets, ())
    chosen = spread(draft.sizes, stage.streamed)
    assert found.fits and len(set(chosen)) == 2
    assert stage.parts["weights"] == draft.weights - sum(chosen) + 2 * max(chosen)
    assert 0 < stage.host - pinned_bytes(chosen) < GIB  # what is parked
