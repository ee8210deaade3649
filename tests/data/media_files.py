"""Writes small real media files for the tests."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from av.video.frame import VideoFrame


def picture(index: int, width: int, height: int) -> np.ndarray:
    """A picture whose upper left corner is bright and whose brightness tells its index."""
    y, x = np.mgrid[0:height, 0:width]
    image = np.stack([x * 100 / width, y * 100 / height, (x + y + 5 * index) % 64], axis=2)
    image[: height // 4, : width // 4] = 250
    image[height // 2 :, width // 2 :] = 10 + 4 * index
    return image.astype(np.uint8)


def encode_video(
    path: Path,
    *,
    frames: int = 24,
    size: tuple[int, int] = (128, 96),
    rate: int = 16,
    codec: str = "libx264",
    pixels: str = "yuv420p",
    times: Sequence[int] | None = None,
    rotation: int | None = None,
    options: dict[str, str] | None = None,
    faststart: bool = False,
) -> Path:
    """Encode a video; `times` are presentation times in milliseconds for a variable frame rate."""
    movflags = {"movflags": "faststart"} if faststart else {}
    with av.open(str(path), "w", options=movflags) as container:
        stream = container.add_stream(codec, rate=rate, options=options or {})
        stream.width, stream.height, stream.pix_fmt = *size, pixels
        if times:
            stream.time_base = stream.codec_context.time_base = Fraction(1, 1000)
        if rotation:
            stream.set_display_rotation(rotation)
        for index in range(frames):
            frame = VideoFrame.from_ndarray(picture(index, *size), format="rgb24")
            if times:
                frame.pts, frame.time_base = times[index], Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path
