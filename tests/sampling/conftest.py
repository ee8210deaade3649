"""Traits of a video model and of one that starts from an image."""

from __future__ import annotations

from dataclasses import replace

import pytest

from tworeel.models.family import Traits


@pytest.fixture
def traits() -> Traits:
    return Traits(
        family="wan",
        variant="wan2.1-t2v-1.3b",
        frame_rate=16,
        spatial_multiple=16,
        temporal_stride=4,
        tokens_per_pixel_area=256,
    )


@pytest.fixture
def image_traits(traits: Traits) -> Traits:
    return replace(traits, variant="wan2.2-i2v-a14b", image_inputs=("first_image",))
