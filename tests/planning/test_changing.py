from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from real_models import CLIP, IMAGE, budgets_of, limited, request_of

from tworeel.data.buckets import tokens
from tworeel.data.clips import Bucket
from tworeel.engine.residency import Residency
from tworeel.host_memory import HOST_SHARE
from tworeel.planning import Alternative, Plan, plan
from tworeel.planning.changing import changes, scaled
from tworeel.planning.measurements import FOLDER_VARIABLE
from tworeel.planning.planner import Planner
from tworeel.planning.timing import StepTime, simulate
from tworeel.units import GIB

CARDS = budgets_of("2x RTX 4090")
LONG = replace(CLIP, frames=121)


@pytest.fixture(autouse=True)
def nothing_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(FOLDER_VARIABLE, str(tmp_path))


def test_what_is_set_needlessly_is_named_first_and_alone_if_that_is_enough() -> None:
    planner = Planner(request_of(budgets=CARDS, residency="keep"))
    assert not planner.best().fits
    first = next(changes(planner))
    assert first.name == "engine.residency = 'auto'" and first.fits


def test_settings_that_fit_only_together_are_named_together() -> None:
    budgets = limited(CARDS, 15)
    planner = Planner(request_of(budgets=budgets, residency="keep", streamed=(2, 2)))
    assert next(changes(planner)).name == "engine.residency = 'auto' and engine.streamed_blocks not set"


def test_a_setting_that_has_to_be_released_is_named_with_what_is_needed_beside_it() -> None:
    long = {"buckets": {LONG: 1.0}, "host_free": 24 * GIB, "budgets": limited(CARDS, 12)}
    names = changed(residency="keep", **long)
    assert names and all(name.startswith("engine.residency = 'auto' and ") for name in names)
    assert {f"engine.residency = 'auto' and {name}" for name in changed(**long)} == set(names)


@pytest.mark.parametrize(
    ("split_at", "name"),
    [
        (None, "engine.stages_per_device = 1"),
        ((10, 20, 30), "engine.stages_per_device = 1 and engine.split_at not set"),
    ],
)
def test_two_stages_a_device_are_released_with_what_is_set_for_each(
    split_at: tuple[int, ...] | None, name: str
) -> None:
    request = request_of(
        budgets=budgets_of("2x RTX 3060 12GB"), micro_batches=4, stages_per_device=2, split_at=split_at
    )
    request = replace(request, trace=replace(request.trace, quantize="int8"))
    planner = Planner(request)
    assert not planner.best().fits
    first = next(changes(planner))
    assert first.name == name and first.fits


def test_what_is_set_for_each_stage_is_released_with_a_card() -> None:
    names = changed(budgets=limited(CARDS, 18), host_free=24 * GIB, split_at=(20,))
    assert "one more RTX 4090 and engine.split_at not set" in names


def test_a_card_that_holds_the_others_up_may_be_left_out() -> None:
    """Its own share and the optimizer's do not fit the small one, whatever the split."""
    large, small = budgets_of("RTX 4090, RTX 3060 12GB")
    small = replace(small, total=2 * GIB, free=int(1.2 * GIB))
    request = request_of(budgets=(large, small), micro_batches=2)
    request = replace(request, trace=replace(request.trace, quantize="fp8"))
    planner = Planner(request)
    assert not planner.best().fits and Planner(replace(request, budgets=(large,))).best().fits
    first = next(changes(planner))
    assert first.name == "without RTX 3060 12GB" and first.fits
    here = [replace(budget, context=None) for budget in (large, small)]
    first = next(changes(Planner(replace(request, budgets=tuple(here)), planner.trace, planner)))
    assert first.name == "without RTX 3060 12GB: engine.devices = ['cuda:0']"


def test_of_two_like_cards_the_one_that_is_full_may_be_left_out() -> None:
    empty, full = budgets_of("2x RTX 4090")
    full = replace(full, free=int(1.2 * GIB))
    request = request_of(budgets=(empty, full), micro_batches=2)
    request = replace(request, trace=replace(request.trace, quantize="fp8"))
    first = next(changes(Planner(request)))
    assert first.name == "without the full RTX 4090" and first.fits


def changed(variant: str = "wan2.2-t2v-a14b", /, **changes_: Any) -> dict[str, Alternative]:
    planner = Planner(request_of(variant, **changes_))
    assert not planner.best().fits
    found = {change.name: change for change in changes(planner)}
    assert all(change.fits for change in found.values())
    return found


def test_the_longest_clip_that_fits_is_found_in_a_few_tries(monkeypatch: pytest.MonkeyPatch) -> None:
    request = request_of(budgets=limited(CARDS, 12), host_free=24 * GIB, buckets={LONG: 1.0})
    tried: list[int] = []
    best = Planner.best

    def counted(planner: Planner) -> Plan:
        tried.append(planner.largest.frames)
        return best(planner)

    monkeypatch.setattr(Planner, "best", counted)
    planner = Planner(request)
    (name,) = [change.name for change in changes(planner) if "frames" in change.name]
    frames = int(name.split()[4])
    shorter = [number for number in tried if number != LONG.frames]
    assert len(shorter) <= 6 and frames in shorter and frames + 4 in {*shorter, LONG.frames}


def test_shorter_clips_are_planned_in_the_mix_that_there_is() -> None:
    host = {"budgets": budgets_of("2x RTX 4070"), "host_free": 16 * GIB}
    alone = changed(buckets={CLIP: 1.0}, **host)
    mixed = changed(buckets={CLIP: 1.0, IMAGE: 19.0}, **host)
    (name,) = [one for one in alone if "frames" in one]
    assert name in mixed
    alone_seconds, mixed_seconds = alone[name].seconds_per_step, mixed[name].seconds_per_step
    assert alone_seconds is not None and mixed_seconds is not None and mixed_seconds < 0.5 * alone_seconds


def test_clips_of_one_frame_are_proposed_where_the_model_takes_them() -> None:
    budgets = limited(budgets_of("2x RTX 3060 12GB"), 5.3)
    assert "clips of at most 1 frame, longer ones cut" in changed(
        budgets=budgets, host_free=24 * GIB, micro_batches=2
    )


def test_clips_get_smaller_where_all_that_still_fits_is_the_frame_that_a_model_is_given() -> None:
    found = changed(
        "wan2.1-i2v-14b",
        budgets=limited(budgets_of("2x RTX 3060 12GB"), 4.1),
        host_free=60 * GIB,
        micro_batches=2,
    )
    assert "272 × 144 pixels (data.resolution)" in found
    assert not any("frame" in name for name in found)


def test_images_get_smaller_as_they_cannot_get_shorter() -> None:
    image = Bucket(frames=1, height=2048, width=1024)
    found = changed(budgets=limited(CARDS, 5.75), host_free=64 * GIB, buckets={image: 1.0})
    (name,) = [one for one in found if one.endswith("pixels (data.resolution)")]
    width, height = map(int, name.split()[:3:2])
    assert 256 <= height < 2048 and height == pytest.approx(2 * width, abs=32) and not width % 16


def test_more_host_memory_is_named_where_that_is_what_is_short_in_what_the_machine_has() -> None:
    found = changed(budgets=CARDS, host_free=4 * GIB)
    (name,) = [one for one in found if one.endswith("GiB of available host memory")]
    gib = int(name.split()[0])
    needed, short = (
        Planner(request_of(budgets=CARDS, host_free=int(HOST_SHARE * size * GIB))).best()
        for size in (gib, gib - 1)
    )
    assert needed.fits and not short.fits


@pytest.mark.parametrize(
    ("gpus", "kind"), [("2x RTX 3090", "int8"), ("2x RTX 4090", "fp8"), ("RTX 4090, RTX 3090", "int8")]
)
def test_the_8_bits_are_those_that_the_cards_multiply(gpus: str, kind: str) -> None:
    assert f"model.quantize = '{kind}'" in changed(budgets=budgets_of(gpus), host_free=11 * GIB)


def test_one_more_card_has_a_name_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = limited(CARDS, 12)
    planned: list[list[str]] = []
    best = Planner.best

    def seen(planner: Planner) -> Plan:
        planned.append([budget.device for budget in planner.request.budgets])
        return best(planner)

    monkeypatch.setattr(Planner, "best", seen)
    request = request_of(budgets=(first, replace(second, device="cuda:2")), host_free=12 * GIB)
    list(changes(Planner(request)))
    assert ["cuda:0", "cuda:2", "cuda:1"] in planned


@pytest.mark.parametrize("gpus", ["RTX 3060 12GB, RTX 4060 Ti 16GB, RTX 4070, RTX 4080"])
def test_little_is_simulated_for_unlike_cards_also_where_nothing_fits(
    gpus: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps: list[int] = []

    def counted(*args: Any, **more: Any) -> StepTime:
        steps.append(1)
        return simulate(*args, **more)

    monkeypatch.setattr("tworeel.planning.planner.simulate", counted)
    request = request_of(
        budgets=limited(budgets_of(gpus), 5), may_reorder=True, may_interleave=True, host_free=4 * GIB
    )
    found = plan(request)
    assert not found.fits and len(steps) < 6000


@pytest.mark.parametrize("frames", [25, 81])
def test_a_scaled_trace_is_near_that_of_the_clip(frames: int) -> None:
    request, bucket = request_of(), replace(CLIP, frames=frames)
    traits = request.source.traits
    share = tokens(bucket, traits) / tokens(CLIP, traits)
    (guess,) = scaled(Planner(request).trace, share).blocks.values()
    (found,) = Planner(replace(request, buckets={bucket: 1.0})).trace.blocks.values()
    assert guess.footprints[Residency.KEEP].kept == pytest.approx(
        found.footprints[Residency.KEEP].kept, rel=0.05
    )
    assert guess.backward.attention == pytest.approx(found.backward.attention, rel=0.05)


def test_no_card_is_proposed_that_would_have_no_block() -> None:
    source = request_of().source
    transformer = replace(source.transformer, config={**source.transformer.config, "num_layers": 2})
    small = replace(source, transformer=transformer)
    settings = replace(request_of().trace, targets=("blocks.0.attn1.to_q", "blocks.1.attn1.to_q"))
    found = changed(source=small, trace=settings, budgets=limited(CARDS, 1), host_free=GIB)
    assert not any(name.startswith("one more") for name in found)
