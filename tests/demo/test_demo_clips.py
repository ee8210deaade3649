"""The drawn dataset of the demo."""

from __future__ import annotations

from pathlib import Path

from tworeel.data.media import probe
from tworeel.demo.clips import write_clips


def test_clips_differ_in_form_and_have_captions(tmp_path: Path) -> None:
    paths = write_clips(tmp_path / "new" / "folder")
    infos = [probe(path) for path in paths]
    assert len({(info.width / info.height, info.frames) for info in infos}) == 7
    assert len({round(info.fps) for info in infos}) >= 5
    assert all(1 <= info.duration <= 2 for info in infos[:-1]) and infos[-1].is_image
    assert all(path.with_suffix(".txt").read_text(encoding="utf-8").strip() for path in paths)


def test_the_same_seed_draws_the_same_files(tmp_path: Path) -> None:
    first, second = (write_clips(tmp_path / name, count=3, seed=5) for name in ("a", "b"))
    assert [path.read_bytes() for path in first] == [path.read_bytes() for path in second]
    other = write_clips(tmp_path / "c", count=3, seed=6)
    assert [path.read_bytes() for path in first] != [path.read_bytes() for path in other]
