"""What the data tests share."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from media_files import encode_video

from tworeel.config.schema import DataConfig, SourceConfig
from tworeel.models.family import Traits


@pytest.fixture(scope="session")
def traits() -> Traits:
    return Traits(
        family="wan",
        variant="wan2.2-ti2v-5b",
        frame_rate=16.0,
        spatial_multiple=16,
        temporal_stride=4,
        tokens_per_pixel_area=256,
        image_inputs=("first_image",),
        image_optional=True,
    )


@pytest.fixture
def data_config() -> Callable[..., DataConfig]:
    def make(*paths: Path, **options: object) -> DataConfig:
        sources = tuple(SourceConfig(path=path) for path in paths)
        settings: dict[str, object] = {"resolution": (128, 96), "frames": (1, 5, 9, 17), **options}
        return DataConfig(sources=sources, **settings)

    return make


@pytest.fixture(scope="session")
def good_video(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """24 frames of 128x96 at 16 a second; the index is at the front of the file, the pictures behind it."""
    return encode_video(tmp_path_factory.mktemp("media") / "good.mp4", faststart=True)
