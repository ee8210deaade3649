"""Real clips and a real tiny Wan T2V model's encoders, written once."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tworeel.data.clips import Bucket, Clip
from tworeel.demo.clips import write_clips
from tworeel.models.family import Component, ModelSource, Traits

TRAITS = Traits(
    family="wan",
    variant="wan2.1-t2v-1.3b",
    frame_rate=16,
    spatial_multiple=16,
    temporal_stride=4,
    tokens_per_pixel_area=256,
)


@pytest.fixture(scope="session")
def clips(tmp_path_factory: pytest.TempPathFactory) -> list[Clip]:
    """Four clips of different lengths and one image, each with its caption."""
    paths = write_clips(tmp_path_factory.mktemp("clips"), count=4)
    return [_clip(path, 1 if path.suffix == ".png" else 4 * (k % 3) + 5) for k, path in enumerate(paths)]


@pytest.fixture
def source(
    tiny_vae: Callable[..., Component],
    tiny_text_encoder: Callable[..., Component],
    tiny_tokenizer: Callable[..., Path],
) -> ModelSource:
    """A model of which only the encoders are there."""
    return ModelSource(
        traits=TRAITS,
        transformer=Component(files=(), layout="native"),
        vae=tiny_vae("native"),
        text_encoder=tiny_text_encoder("native"),
        tokenizer=tiny_tokenizer("native"),
    )


def _clip(path: Path, frames: int) -> Clip:
    caption = path.with_suffix(".txt").read_text(encoding="utf-8").strip()
    return Clip(
        path=path,
        caption=f"{caption} {path.name}",
        bucket=Bucket(frames=frames, height=32, width=48),
        frame_indices=tuple(range(frames)),
        name=f"0/{path.name}",
    )
