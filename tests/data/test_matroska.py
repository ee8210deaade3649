"""The length that Matroska files announce."""

from __future__ import annotations

from pathlib import Path

import pytest
from media_files import encode_video

from tworeel.data.matroska import SEGMENT, matroska_length


@pytest.mark.parametrize(("name", "codec"), [("a.mkv", "libx264"), ("a.webm", "libvpx-vp9")])
def test_an_intact_file_is_as_long_as_it_says(tmp_path: Path, name: str, codec: str) -> None:
    path = encode_video(tmp_path / name, frames=6, codec=codec)
    assert matroska_length(path) == path.stat().st_size


@pytest.mark.parametrize(
    ("length", "expected"),
    [(b"\x85", 15), (b"\x40\x05", 16), (b"\xff", 0), (b"\x01" + b"\xff" * 7, 0), (b"", 0)],
)
def test_lengths_may_be_long_unknown_or_missing(tmp_path: Path, length: bytes, expected: int) -> None:
    path = tmp_path / "a.mkv"
    path.write_bytes(b"\x1a\x45\xdf\xa3\x80" + SEGMENT + length)
    assert matroska_length(path) == expected


def test_other_files_announce_nothing(tmp_path: Path) -> None:
    for content in (b"", b"abc", b"some text that is long enough to be read"):
        (tmp_path / "a.mkv").write_bytes(content)
        assert matroska_length(tmp_path / "a.mkv") == 0
