"""What the dataset scan finds: clips to train on, each with the bucket that it goes into."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from tworeel.data.references import Reference


@dataclass(frozen=True, order=True)
class Bucket:
    """Frames and size, in pixels, that a clip is cut and fitted to, and the sizes of its reference images."""

    frames: int
    height: int
    width: int
    references: tuple[tuple[int, int], ...] = ()
    """Height and width of each."""


@dataclass(frozen=True, kw_only=True)
class Clip:
    """One thing to train on: a window of a video, or an image, with its caption."""

    path: Path
    caption: str
    bucket: Bucket
    frame_indices: tuple[int, ...]
    """Indices of the decoded source frames, `bucket.frames` of them; (0,) for an image."""
    images: Mapping[str, Path] = field(default_factory=dict)
    """Condition images by column name (`first_image`, `last_image`), where the metadata gives them."""
    references: tuple[Reference, ...] = ()
    """Reference images, in their order."""
    source: int = 0
    """Index of the dataset in the configuration."""
    name: str
    """Stable within the run and the same on every machine: dataset index, relative path, window."""

    @property
    def files(self) -> tuple[Path, ...]:
        """Every file that it is made of."""
        return (self.path, *self.images.values(), *(reference.path for reference in self.references))
