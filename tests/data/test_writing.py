from __future__ import annotations

from pathlib import Path

import av
from PIL import Image

from tworeel.data.writing import write_video


def test_a_video_has_its_frames_its_rate_and_the_same_bytes_each_time(tmp_path: Path) -> None:
    pictures = [Image.new("RGB", (64, 32), (40 * k, 120, 200 - 30 * k)) for k in range(5)]
    for name in ("a", "b"):
        write_video(tmp_path / f"{name}.mp4", pictures, 23.976)
    assert (tmp_path / "a.mp4").read_bytes() == (tmp_path / "b.mp4").read_bytes()
    with av.open(str(tmp_path / "a.mp4")) as container:
        frames = [frame.to_image() for frame in container.decode(video=0)]
        assert abs(float(container.streams.video[0].average_rate) - 23.976) < 0.01
    assert len(frames) == 5 and frames[0].size == (64, 32)
    for frame, picture in zip(frames, pictures, strict=True):
        got, wanted = frame.getpixel((30, 16)), picture.getpixel((30, 16))
        assert all(abs(a - b) <= 4 for a, b in zip(got, wanted, strict=True))
