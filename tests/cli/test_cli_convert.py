from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

Run = Callable[..., Any]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["gone.safetensors", "new.safetensors"], "gone.safetensors"),
        (["gone.safetensors", "there.safetensors"], "there.safetensors: exists already"),
        (["there.safetensors", "new.safetensors", "--to", "confyui"], "confyui"),
        (["there.safetensors", "new.safetensors", "--family", "wam"], "did you mean 'wan'?"),
        (["there.safetensors", "new.safetensors"], "there.safetensors"),
        (["there.safetensors", "new.pt"], "new.pt: must end in .safetensors"),
    ],
)
def test_what_cannot_be_converted_is_one_line(
    run: Run, tmp_path: Path, options: list[str], words: str
) -> None:
    (tmp_path / "there.safetensors").write_bytes(b"no tensors")
    done = run("convert", *options)
    assert done.code == 2
    assert len(done.err.splitlines()) == 1 and words in done.err
    assert not (tmp_path / "new.safetensors").exists()
