"""Facts, frames and hashes of videos and images."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from media_files import encode_video, picture
from PIL import Image

from tworeel.data.errors import MediaError
from tworeel.data.media import content_hash, probe, read_frames


def test_probe_says_what_the_encoder_wrote(good_video: Path) -> None:
    info = probe(good_video)
    assert (info.frames, info.width, info.height, info.is_image) == (24, 128, 96, False)
    assert info.fps == pytest.approx(16) and info.duration == pytest.approx(1.5)
    assert info.times == pytest.approx([k / 16 for k in range(24)])


FORMS = [
    ("a.mp4", "libx264", "yuv420p"),
    ("a.mp4", "libx265", "yuv420p10le"),
    ("a.mov", "mpeg4", "yuv420p"),
    ("a.mkv", "libx264", "yuv420p"),
    ("a.webm", "libvpx-vp9", "yuv420p"),
    ("a.avi", "mpeg4", "yuv420p"),
    ("a.m4v", "libx264", "yuv444p"),
    ("a.gif", "gif", "rgb8"),
]


@pytest.mark.parametrize(("name", "codec", "pixels"), FORMS)
def test_every_container_is_read(tmp_path: Path, name: str, codec: str, pixels: str) -> None:
    options = {"x265-params": "log-level=none"} if codec == "libx265" else {}
    path = encode_video(tmp_path / name, frames=10, rate=10, codec=codec, pixels=pixels, options=options)
    info = probe(path)
    assert (info.frames, info.width, info.height) == (10, 128, 96)
    assert info.fps == pytest.approx(10, rel=0.02)


def test_frames_come_in_the_order_asked_for_and_equal_a_plain_decoding(good_video: Path) -> None:
    with av.open(str(good_video)) as container:
        plain = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    indices = (20, 3, 3, 0, 23)
    frames = read_frames(good_video, indices)
    assert frames.dtype == torch.uint8 and frames.shape == (5, 96, 128, 3)
    assert all(np.array_equal(frames[k].numpy(), plain[index]) for k, index in enumerate(indices))


def test_colours_survive(tmp_path: Path) -> None:
    path = encode_video(tmp_path / "a.mp4", frames=3, pixels="yuv444p", options={"qp": "4"})
    error = read_frames(path, (1,))[0].numpy().astype(int) - picture(1, 128, 96)
    assert np.abs(error).mean() < 2


def test_odd_sizes_are_read(tmp_path: Path) -> None:
    path = encode_video(tmp_path / "a.mkv", frames=3, size=(97, 51), codec="ffv1", pixels="yuv444p")
    assert (probe(path).width, probe(path).height) == (97, 51)
    assert read_frames(path, (0, 2)).shape == (2, 51, 97, 3)


@pytest.mark.parametrize(("rotation", "corner"), [(90, (-5, 5)), (-90, (5, -5)), (180, (-5, -5))])
def test_rotation_metadata_turns_the_picture(tmp_path: Path, rotation: int, corner: tuple[int, int]) -> None:
    """The bright corner is at the upper left before the rotation, which counts counterclockwise."""
    path = encode_video(tmp_path / "a.mp4", frames=2, rotation=rotation)
    size = (96, 128) if abs(rotation) == 90 else (128, 96)
    assert (probe(path).width, probe(path).height) == size
    frame = read_frames(path, (0,))[0]
    assert frame.shape == (size[1], size[0], 3)
    corners = {(y, x): float(frame[y, x].float().mean()) for y in (5, -5) for x in (5, -5)}
    assert max(corners, key=lambda place: corners[place]) == corner


def test_mirrored_video_is_mirrored_back(tmp_path: Path) -> None:
    path = tmp_path / "a.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=16)
        stream.width, stream.height, stream.pix_fmt = 128, 96, "yuv420p"
        stream.set_display_matrix((-65536, 0, 0, 0, 65536, 0, 0, 0, 1 << 30))
        container.mux(stream.encode(av.VideoFrame.from_ndarray(picture(0, 128, 96), format="rgb24")))
        container.mux(stream.encode())
    frame = read_frames(path, (0,))[0]
    assert frame[5, -5].float().mean() > 200 > frame[5, 5].float().mean()


def test_stretched_pixels_become_square(tmp_path: Path) -> None:
    path = tmp_path / "a.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=16)
        stream.width, stream.height, stream.pix_fmt = 128, 96, "yuv420p"
        stream.codec_context.sample_aspect_ratio = 2
        container.mux(stream.encode(av.VideoFrame.from_ndarray(picture(0, 128, 96), format="rgb24")))
        container.mux(stream.encode())
    assert (probe(path).width, probe(path).height) == (256, 96)
    assert read_frames(path, (0,)).shape == (1, 96, 256, 3)


def test_variable_frame_rates_keep_their_timestamps(tmp_path: Path) -> None:
    times = [0, 40, 300, 340, 900]
    path = encode_video(tmp_path / "a.mkv", frames=5, times=times, rate=25)
    assert probe(path).times == pytest.approx([time / 1000 for time in times], abs=0.002)


def test_a_video_of_one_frame_has_a_duration(tmp_path: Path) -> None:
    info = probe(encode_video(tmp_path / "a.mp4", frames=1))
    assert info.frames == 1 and info.duration == pytest.approx(1 / 16)


def test_a_copied_cut_with_an_edit_list_is_intact(tmp_path: Path) -> None:
    whole = encode_video(tmp_path / "whole.mp4", frames=40, options={"g": "10"})
    cut = tmp_path / "cut.mp4"
    with av.open(str(whole)) as source, av.open(str(cut), "w") as target:
        stream = target.add_stream_from_template(source.streams.video[0])
        packets = [packet for packet in source.demux(video=0) if packet.dts is not None]
        first = next(k for k, packet in enumerate(packets) if k and packet.is_keyframe)
        start = packets[first].pts + 3 * packets[first].duration
        for packet in packets[first:]:
            packet.pts, packet.dts, packet.stream = packet.pts - start, packet.dts - start, stream
            target.mux(packet)
    info = probe(cut)
    assert 20 <= info.frames <= 30
    assert read_frames(cut, (info.frames - 1,)).shape[0] == 1


def test_images_are_turned_upright_and_lose_transparency(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(picture(0, 64, 48)).save(tmp_path / "a.jpg", exif=exif)
    info = probe(tmp_path / "a.jpg")
    assert (info.width, info.height, info.frames, info.is_image) == (48, 64, 1, True)
    assert read_frames(tmp_path / "a.jpg", (0,))[0][5, -5].float().mean() > 200
    Image.new("RGBA", (8, 6), (10, 20, 30, 0)).save(tmp_path / "a.png")
    assert read_frames(tmp_path / "a.png", (0, 0))[1, 0, 0].tolist() == [10, 20, 30]


@pytest.mark.parametrize("mode", ["L", "P", "CMYK", "LA", "1"])
def test_image_modes_become_rgb(tmp_path: Path, mode: str) -> None:
    path = tmp_path / ("a.jpg" if mode == "CMYK" else "a.png")
    Image.new(mode, (8, 6)).save(path)
    assert read_frames(path, (0,)).shape == (1, 6, 8, 3)


def test_images_that_would_lose_something_are_refused(tmp_path: Path) -> None:
    Image.new("I;16", (8, 6)).save(tmp_path / "deep.png")
    frames = [Image.new("RGB", (8, 6), colour) for colour in ("red", "blue")]
    frames[0].save(tmp_path / "moving.webp", save_all=True, append_images=frames[1:])
    with pytest.raises(MediaError, match="more than 8 bits"):
        probe(tmp_path / "deep.png")
    with pytest.raises(MediaError, match="animated"):
        probe(tmp_path / "moving.webp")


def test_the_content_hash_is_sha256(good_video: Path) -> None:
    assert content_hash(good_video) == hashlib.sha256(good_video.read_bytes()).hexdigest()
    with pytest.raises(MediaError, match="no such file"):
        content_hash(good_video.with_name("missing.mp4"))


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes here")
def test_a_pipe_is_refused_rather_than_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a.mp4")
    with pytest.raises(MediaError, match="not a regular file"):
        probe(tmp_path / "a.mp4")
