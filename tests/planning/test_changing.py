from __future__ import annotations

from dataclasses import replace

import pytest
from real_models import CLIP, budgets_of, limited, request_of

from tworeel.data.buckets import tokens
from tworeel.engine.residency import Residency
from tworeel.planning.changing import changes, scaled
from tworeel.planning.planner import Planner

CARDS = budgets_of("2x RTX 4090")


def test_what_is_set_needlessly_is_named_first_and_alone_if_that_is_enough() -> None:
    planner = Planner(request_of(budgets=CARDS, residency="keep"))
    assert not planner.best().fits
    first = next(changes(planner))
    assert first.name == "engine.residency = 'auto'" and first.fits


def test_settings_that_fit_only_together_are_named_together() -> None:
    budgets = limited(CARDS, 15)
    planner = Planner(request_of(budgets=budgets, residency="keep", streamed=(2, 2)))
    assert next(changes(planner)).name == "engine.residency = 'auto' and engine.streamed_blocks not set"


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
