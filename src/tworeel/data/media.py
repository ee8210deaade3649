"""Videos and images as the rest of the package sees them: facts, frames, a content hash."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from tworeel.data.errors import MediaError
from tworeel.data.images import read_image
from tworeel.data.video import frames_at, probe_video
from tworeel.files import sha256_of

VIDEO_SUFFIXES = (".mp4", ".mov", ".mkv", ".webm", ".avi", ".m4v", ".gif")
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")


@dataclass(frozen=True, kw_only=True)
class MediaInfo:
    """What reading the whole file found."""

    frames: int
    fps: float
    """Average frames a second; 0 for an image."""
    width: int
    height: int
    """Pixels as displayed (rotation and pixel aspect applied)."""
    duration: float
    """Seconds; 0 for an image."""
    is_image: bool
    times: tuple[float, ...]
    """Seconds from the first frame, one a frame, never falling."""


def is_image(path: Path) -> bool:
    """Tell by its ending whether a file is an image."""
    return path.suffix.lower() in IMAGE_SUFFIXES


def probe(path: Path) -> MediaInfo:
    """Decode a whole file strictly; raises `MediaError` with one line for anything that is not intact."""
    check_readable(path)
    if is_image(path):
        height, width = read_image(path).shape[:2]
        return MediaInfo(
            frames=1, fps=0.0, width=width, height=height, duration=0.0, is_image=True, times=(0.0,)
        )
    facts = probe_video(path)
    count = len(facts.times)
    return MediaInfo(
        frames=count,
        fps=count / facts.duration,
        width=facts.width,
        height=facts.height,
        duration=facts.duration,
        is_image=False,
        times=facts.times,
    )


def iter_frames(path: Path, indices: Sequence[int]) -> Iterator[tuple[int, np.ndarray]]:
    """Yield (index, uint8 RGB picture of shape (height, width, 3)) once for each index, in rising order.

    Raises `MediaError` if the file cannot be decoded up to the last of them.
    """
    assert indices and min(indices) >= 0, f"no such frames: {indices}"
    check_readable(path)
    if is_image(path):
        assert set(indices) == {0}, f"an image has one frame, not {indices}"
        yield 0, read_image(path)
        return
    yield from frames_at(path, set(indices))


def read_frames(path: Path, indices: Sequence[int]) -> Tensor:
    """Decode some frames: uint8 RGB, shape (len(indices), height, width, 3), in the order of `indices`.

    Only wanted frames are kept. Raises `MediaError` if the file cannot be decoded up to the last of them.
    """
    pictures = dict(iter_frames(path, indices))
    return torch.from_numpy(np.stack([pictures[index] for index in indices]))


def content_hash(path: Path) -> str:
    """Return the SHA-256 of a file's bytes, in hexadecimal; raises `MediaError` if it cannot be read."""
    check_readable(path)
    try:
        return sha256_of(path)
    except OSError as error:
        raise MediaError(path, f"cannot be read: {error.strerror}") from error


def check_readable(path: Path) -> None:
    """Raise `MediaError` unless this is a regular file with something in it (opening a pipe would hang)."""
    try:
        if not path.exists():
            raise MediaError(path, "no such file")
        if not path.is_file():
            raise MediaError(path, "is not a regular file")
        if not path.stat().st_size:
            raise MediaError(path, "is empty (0 bytes)")
    except OSError as error:
        raise MediaError(path, f"cannot be read: {error.strerror}") from error
