"""Files that are either whole or absent: a power cut, a full disk or `kill -9` leaves the old content."""

from __future__ import annotations

import contextlib
import hashlib
import os
import platform
import shutil
import sys
import time
import uuid
from collections.abc import Callable
from pathlib import Path

import psutil

TEMPORARY_PREFIX = ".tmp-"
ABANDONED_AFTER_SECONDS = 24 * 3600.0


def write_atomic(path: Path, write: Callable[[Path], None]) -> None:
    """Replace `path` by what `write` puts into the temporary file that it is given.

    The temporary file stands beside `path` and keeps its suffix. It is flushed to the disk before it takes
    the name of `path`, and it is removed if anything fails; `path` then keeps its old content.

    Raises:
        OSError: The folder is missing or not writable, or the disk is full (`errno.ENOSPC`).
    """
    temporary = temporary_sibling(path)
    try:
        write(temporary)
        fsync_file(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    fsync_folder(path.parent)


def write_bytes_atomic(path: Path, data: bytes) -> None:
    """Replace `path` by `data`, as `write_atomic` does."""

    def write(temporary: Path) -> None:
        temporary.write_bytes(data)

    write_atomic(path, write)


def write_text_atomic(path: Path, text: str) -> None:
    """Replace `path` by `text` in UTF-8, with line ends as given, as `write_atomic` does."""
    write_bytes_atomic(path, text.encode("utf-8"))


def fsync_file(path: Path) -> None:
    """Wait until the content of `path` is on the disk."""
    with path.open("r+b") as file:  # Windows flushes only handles that may write
        os.fsync(file.fileno())


def fsync_folder(folder: Path) -> None:
    """Wait until the names in `folder` are on the disk; Windows has no such call and does it by itself."""
    if sys.platform == "win32":
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sha256_of(path: Path) -> str:
    """Return the SHA-256 of a file's content in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def temporary_sibling(path: Path) -> Path:
    """Return a new name beside `path` that says which process of which machine writes it."""
    token = uuid.uuid4().hex[:12]
    return path.with_name(f"{TEMPORARY_PREFIX}{_machine()}-{os.getpid()}-{token}{path.suffix}")


def sweep_temporaries(folder: Path) -> list[Path]:
    """Remove `.tmp-*` files and folders in `folder` that no writer will finish; return what was removed.

    Those of a process of this machine that is gone are removed at once, all others after a day without a
    change. Two sweeps at a time do not disturb each other.
    """
    removed = []
    for path in sorted(folder.glob(f"{TEMPORARY_PREFIX}*")):
        with contextlib.suppress(FileNotFoundError):  # its writer, or another sweep, was faster
            if _is_abandoned(path):
                remove(path)
                removed.append(path)
    return removed


def remove(path: Path) -> None:
    """Remove a file or a folder with all that it holds."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()


def _is_abandoned(temporary: Path) -> bool:
    parts = temporary.name.removeprefix(TEMPORARY_PREFIX).split("-")
    if len(parts) == 3 and parts[0] == _machine() and parts[1].isdecimal():
        return not psutil.pid_exists(int(parts[1]))
    return time.time() - temporary.lstat().st_mtime > ABANDONED_AFTER_SECONDS


def _machine() -> str:
    """A short name of this machine, or container, for file names: process ids mean nothing on another."""
    return hashlib.sha256(platform.node().encode()).hexdigest()[:8]
