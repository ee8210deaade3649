"""Writes videos."""

from __future__ import annotations

from collections.abc import Iterable
from fractions import Fraction
from pathlib import Path

import av
from av.video.frame import VideoFrame
from PIL import Image


def write_video(path: Path, pictures: Iterable[Image.Image], rate: float, *, quantizer: int = 18) -> None:
    """Write an H.264 video; the same pictures give the same bytes.

    Args:
        path: ends in `.mp4`.
        pictures: of one size, with an even width and height.
        rate: frames a second.
        quantizer: x264's; lower is better and larger.
    """
    with av.open(str(path), "w") as container:
        # A fixed quantizer and one thread: x264's rate control does not repeat itself bit by bit.
        options = {"threads": "1", "qp": str(quantizer)}
        stream = container.add_stream("libx264", rate=Fraction(rate).limit_denominator(1001), options=options)
        stream.pix_fmt = "yuv420p"
        for number, picture in enumerate(pictures):
            if number == 0:
                stream.width, stream.height = picture.size
            container.mux(stream.encode(VideoFrame.from_image(picture)))
        container.mux(stream.encode())
