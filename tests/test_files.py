"""Atomic writes: whole or absent, whatever fails."""

from __future__ import annotations

import errno
import hashlib
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tworeel.files import (
    sha256_of,
    sweep_temporaries,
    temporary_sibling,
    write_atomic,
    write_bytes_atomic,
    write_text_atomic,
)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_write_replaces_the_whole_content(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    write_text_atomic(path, "a long first text")
    write_text_atomic(path, "zwölf\n")
    assert path.read_bytes() == "zwölf\n".encode()
    assert names(tmp_path) == ["a.txt"]


def test_the_writer_is_given_a_sibling_with_the_same_suffix(tmp_path: Path) -> None:
    seen: list[Path] = []

    def write(temporary: Path) -> None:
        seen.append(temporary)
        temporary.write_bytes(b"x")

    write_atomic(tmp_path / "a.safetensors", write)
    assert (
        seen[0].parent == tmp_path and seen[0].suffix == ".safetensors" and seen[0].name.startswith(".tmp-")
    )


@pytest.mark.parametrize("failure", [OSError(errno.ENOSPC, "full"), KeyboardInterrupt(), ValueError("no")])
def test_a_failed_write_keeps_the_old_content_and_leaves_no_temporary(
    tmp_path: Path, failure: BaseException
) -> None:
    path = tmp_path / "a.bin"
    write_bytes_atomic(path, b"old")

    def write(temporary: Path) -> None:
        temporary.write_bytes(b"half of the n")
        raise failure

    with pytest.raises(type(failure)):
        write_atomic(path, write)
    assert path.read_bytes() == b"old"
    assert names(tmp_path) == ["a.bin"]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
def test_a_device_that_is_really_full_keeps_the_old_content(tmp_path: Path) -> None:
    path = tmp_path / "a.bin"
    write_bytes_atomic(path, b"old")

    def write(temporary: Path) -> None:
        temporary.symlink_to("/dev/full")
        temporary.write_bytes(b"new")

    with pytest.raises(OSError, match="No space left") as caught:
        write_atomic(path, write)
    assert caught.value.errno == errno.ENOSPC
    assert path.read_bytes() == b"old"
    assert names(tmp_path) == ["a.bin"]


def test_the_digest_is_that_of_the_content(tmp_path: Path) -> None:
    data = bytes(range(256)) * 5000
    write_bytes_atomic(tmp_path / "a.bin", data)
    assert sha256_of(tmp_path / "a.bin") == hashlib.sha256(data).hexdigest()


def test_a_sweep_removes_what_dead_writers_left_and_nothing_else(tmp_path: Path) -> None:
    child = subprocess.Popen([sys.executable, "-c", ""])
    child.wait()
    mine = temporary_sibling(tmp_path / "a.bin")
    dead = tmp_path / mine.name.replace(f"-{os.getpid()}-", f"-{child.pid}-")
    dead_folder = dead.with_name(dead.name.replace(".bin", ".folder"))
    foreign_new, foreign_old = tmp_path / ".tmp-from-elsewhere", tmp_path / ".tmp-from-elsewhere-old"
    for path in (mine, dead, foreign_new, foreign_old, tmp_path / "keep.bin"):
        path.write_bytes(b"x")
    dead_folder.mkdir()
    (dead_folder / "inner").write_bytes(b"x")
    os.utime(foreign_old, (1_000_000, 1_000_000))

    assert set(sweep_temporaries(tmp_path)) == {dead, dead_folder, foreign_old}
    assert names(tmp_path) == sorted([".tmp-from-elsewhere", "keep.bin", mine.name])
