"""Damaged media files are reported, with one line, and nothing hangs."""

from __future__ import annotations

import random
import struct
from collections.abc import Callable
from pathlib import Path

import av
import numpy as np
import pytest
from media_files import encode_video, picture
from PIL import Image

from tworeel.data.errors import MediaError
from tworeel.data.media import probe, read_frames


def is_reported(path: Path) -> bool:
    try:
        probe(path)
    except MediaError as error:
        problems = error.problems
    else:
        return False
    assert len(problems) == 1 and problems[0].startswith(str(path)) and "\n" not in problems[0]
    return True


def media_bytes(path: Path) -> list[int]:
    """Offsets of the compressed pictures; without the encoder's text, which stands before the first one."""
    with av.open(str(path)) as container:
        packets = [(packet.pos, packet.size) for packet in container.demux(video=0) if packet.size]
    first = 700 if b"x264" in path.read_bytes()[packets[0][0] : packets[0][0] + 100] else 0
    return [x for k, (at, size) in enumerate(packets) for x in range(at + (0 if k else first), at + size)]


def pictures_of(path: Path) -> list[bytes]:
    with av.open(str(path)) as container:
        return [bytes(packet) for packet in container.demux(video=0) if packet.size]


def count_reported(path: Path, damaged: Path, damage: Callable[[bytearray], bytearray], tries: int) -> int:
    found = 0
    for _ in range(tries):
        damaged.write_bytes(damage(bytearray(path.read_bytes())))
        found += is_reported(damaged)
    return found


@pytest.fixture(scope="module")
def detailed_video(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """640x360, H.264: bytes as densely used as in footage."""
    path = tmp_path_factory.mktemp("damage") / "detailed.mp4"
    y, x = np.mgrid[0:360, 0:640]
    rng = np.random.default_rng(0)
    with av.open(str(path), "w", options={"movflags": "faststart"}) as container:
        stream = container.add_stream("libx264", rate=16, options={"threads": "1", "qp": "24"})
        stream.width, stream.height, stream.pix_fmt = 640, 360, "yuv420p"
        for k in range(8):
            waves = [
                127 + 100 * np.sin(x / 17 + k / 5),
                127 + 100 * np.cos(y / 13 - k / 7),
                (x + y + 3 * k) % 256,
            ]
            image = np.stack(waves, axis=2) + rng.normal(0, 2, (360, 640, 3))
            frame = av.VideoFrame.from_ndarray(image.clip(0, 255).astype(np.uint8), format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def test_most_flipped_bytes_are_reported(detailed_video: Path, tmp_path: Path) -> None:
    """H.264 has no checksums: a flip that decodes to another picture of the same length is not visible."""
    offsets, rng = media_bytes(detailed_video), random.Random(0)

    def flip(data: bytearray) -> bytearray:
        data[rng.choice(offsets)] ^= rng.randrange(1, 256)
        return data

    found = count_reported(detailed_video, tmp_path / "a.mp4", flip, 40)
    assert found >= 32


@pytest.mark.parametrize("name", ["a.mp4", "a.mkv", "a.avi", "a.webm", "a.mov", "a.gif"])
def test_cut_off_videos_are_reported(tmp_path: Path, name: str) -> None:
    codec = {"a.webm": "libvpx-vp9", "a.avi": "mpeg4", "a.gif": "gif"}.get(name, "libx264")
    pixels, faststart = "rgb8" if codec == "gif" else "yuv420p", name in ("a.mp4", "a.mov")
    whole = encode_video(tmp_path / f"whole_{name}", codec=codec, pixels=pixels, faststart=faststart)
    size, rng = whole.stat().st_size, random.Random(0)
    assert not is_reported(whole)
    found = count_reported(whole, tmp_path / name, lambda data: data[: rng.randrange(size * 9 // 10)], 12)
    assert found == 12


def test_overwritten_blocks_are_reported(detailed_video: Path, tmp_path: Path) -> None:
    offsets, rng = media_bytes(detailed_video), random.Random(0)

    def overwrite(data: bytearray) -> bytearray:
        start = rng.choice(offsets[:-4096])
        data[start : start + 4096] = bytes(4096)
        return data

    assert count_reported(detailed_video, tmp_path / "a.mp4", overwrite, 20) >= 19


def test_any_damage_anywhere_ends_in_one_line_or_a_picture(good_video: Path, tmp_path: Path) -> None:
    """Headers included: no hang, no other exception than the one for users."""
    rng, size = random.Random(1), good_video.stat().st_size

    def scramble(data: bytearray) -> bytearray:
        for _ in range(rng.choice((1, 3, 30))):
            data[rng.randrange(min(size, rng.choice((200, 2000, size))))] = rng.randrange(256)
        return data

    count_reported(good_video, tmp_path / "a.mp4", scramble, 80)


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".webp", ".bmp"])
def test_damaged_images_end_in_one_line_or_a_picture(tmp_path: Path, suffix: str) -> None:
    rng, path = random.Random(2), tmp_path / f"a{suffix}"
    Image.fromarray(picture(0, 40, 30)).save(path)
    size = path.stat().st_size
    cut = count_reported(path, tmp_path / f"cut{suffix}", lambda data: data[: rng.randrange(size - 8)], 20)
    assert cut == 20

    def flip(data: bytearray) -> bytearray:
        data[rng.randrange(size)] ^= 1 << rng.randrange(8)
        return data

    flips = count_reported(path, tmp_path / f"flip{suffix}", flip, 60)
    assert flips >= 55 or suffix != ".png"


def test_files_that_are_no_video_are_reported_as_what_they_are(tmp_path: Path) -> None:
    sound = tmp_path / "sound.mp4"
    with av.open(str(sound), "w") as container:
        stream = container.add_stream("aac", rate=44100)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 4096), np.float32), format="fltp", layout="mono")
        frame.sample_rate = 44100
        container.mux(stream.encode(frame))
        container.mux(stream.encode())
    (tmp_path / "text.mp4").write_text("a caption in the wrong place " * 50)
    (tmp_path / "empty.mp4").touch()
    (tmp_path / "folder.mp4").mkdir()
    (tmp_path / "text.png").write_text("not an image")
    expected = {
        "sound.mp4": "no video stream .found: audio",
        "text.mp4": "cannot be decoded: Invalid data",
        "empty.mp4": "is empty",
        "folder.mp4": "not a regular file",
        "text.png": "cannot be read as an image",
        "missing.mp4": "no such file",
    }
    for name, reason in expected.items():
        with pytest.raises(MediaError, match=reason):
            probe(tmp_path / name)


def test_a_playlist_in_disguise_opens_no_other_file(good_video: Path, tmp_path: Path) -> None:
    for name, text in {
        "hls.mp4": f"#EXTM3U\n#EXT-X-TARGETDURATION:2\n#EXTINF:1.5,\n{good_video}\n#EXT-X-ENDLIST\n",
        "concat.mp4": f"ffconcat version 1.0\nfile '{good_video}'\n",
    }.items():
        (tmp_path / name).write_text(text)
        with pytest.raises(MediaError, match="cannot be decoded"):
            probe(tmp_path / name)


def test_frames_missing_from_the_index_are_reported(good_video: Path, tmp_path: Path) -> None:
    """A file that lost its last frames, and whose sizes table still lists them, is not read as shorter."""
    data = good_video.read_bytes()
    last = media_bytes(good_video)[-1]
    (tmp_path / "a.mp4").write_bytes(data[: last - 300])
    with pytest.raises(MediaError, match=r"frame|cut off"):
        probe(tmp_path / "a.mp4")


def test_a_picture_of_absurd_size_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.avi"
    encode_video(path, frames=2, codec="rawvideo", pixels="yuv420p", size=(16, 16))
    data = path.read_bytes()
    at = data.index(b"strf") + 12
    path.write_bytes(data[:at] + struct.pack("<ii", 40000, 40000) + data[at + 8 :])
    assert is_reported(path)


def test_a_file_that_shrank_since_the_scan_is_an_error(good_video: Path) -> None:
    with pytest.raises(MediaError, match="no frame 24"):
        read_frames(good_video, (0, 24))


def test_a_video_whose_pictures_change_size_is_refused(tmp_path: Path) -> None:
    """The last picture of one Motion JPEG file is overwritten with a smaller one."""
    large, small = (
        encode_video(tmp_path / f"{width}.avi", frames=4, size=(width, 96), codec="mjpeg", pixels="yuvj420p")
        for width in (96, 48)
    )
    [_, _, _, last], [*_, jpeg] = pictures_of(large), pictures_of(small)
    data = bytearray(large.read_bytes())
    assert len(jpeg) <= len(last)
    at = data.index(last)
    data[at : at + len(last)] = jpeg + bytes(len(last) - len(jpeg))
    large.write_bytes(data)
    with pytest.raises(MediaError, match="changes its size at frame 3, from 96x96 to 48x96"):
        probe(large)
