from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

Run = Callable[..., Any]


def test_clips_are_encoded_once(run: Run, small_run: list[str], tmp_path: Path) -> None:
    first = run("cache", *small_run)
    assert first.code == 0, first.err
    assert f"3 clips are in the cache: {tmp_path / 'cache'}" in first.out
    assert "Encoding clips" in first.out
    second = run("cache", *small_run)
    assert second.code == 0
    assert "Encoding clips" not in second.out
