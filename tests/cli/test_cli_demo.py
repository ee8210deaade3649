from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

Run = Callable[..., Any]


def test_a_folder_with_other_things_is_left_alone(run: Run, tmp_path: Path) -> None:
    mine = tmp_path / "mine" / "thesis.txt"
    mine.parent.mkdir()
    mine.write_text("years of work", encoding="utf-8")
    done = run("demo", mine.parent)
    assert done.code == 2
    assert str(mine.parent) in done.err and len(done.err.splitlines()) == 1
    assert [path.name for path in mine.parent.iterdir()] == ["thesis.txt"]
