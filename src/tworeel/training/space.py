"""Free space: checked before it is needed, and a full disk told in words."""

from __future__ import annotations

import contextlib
import errno
import shutil
from collections.abc import Iterator
from pathlib import Path

from tworeel.errors import UserError
from tworeel.units import GIB

# A quota that is used up looks like a full disk to the user. Windows' errno module may lack the name.
_FULL_ERRNOS = frozenset({errno.ENOSPC, getattr(errno, "EDQUOT", errno.ENOSPC)})


RESULTS = "the run with its checkpoints and its LoRA"


class OutOfSpace(UserError):
    """The disk has no room for what is about to be, or was being, written."""


def free_space(path: Path) -> int:
    """Return the bytes that are free where `path` is, or would be created."""
    return shutil.disk_usage(_nearest_existing(path)).free


def require_space(path: Path, needed: int, what: str) -> None:
    """Raise `OutOfSpace` if fewer than `needed` bytes are free where `path` is, or would be created.

    Args:
        path: A file or folder; it need not exist.
        needed: Bytes.
        what: What needs the room, for example `"a checkpoint"`.
    """
    free = free_space(path)
    if free < needed:
        raise OutOfSpace(
            f"{path}: {what} needs {_gib(needed)}, but only {_gib(free)} are free on that disk; "
            "free some space or choose another folder"
        )


def space_of_results(lora: int, keep: int, checkpoints: Path) -> int:
    """Return the bytes that a run's checkpoints and its LoRA take beside what is there already.

    Args:
        lora: Bytes of the LoRA's weights.
        keep: Checkpoints that are kept.
        checkpoints: Their folder; those of a run that goes on make room for its own, but not what was set
            aside.
    """
    there = sum(path.stat().st_size for path in checkpoints.glob("step-*/*"))
    # With two moments; and one more than is kept stands while it is written.
    return 3 * lora + max(0, keep * 3 * lora - there) + lora


@contextlib.contextmanager
def full_disk_as_user_error(path: Path, what: str, kept: str) -> Iterator[None]:
    """Turn a full disk (or quota) inside the block into `OutOfSpace`; every other error passes.

    Args:
        path: What is being written.
        what: Says what it is, for example `"the checkpoint of step 100"`.
        kept: What the user still has, for example `"earlier checkpoints are intact"`.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in _FULL_ERRNOS:
            raise
        raise OutOfSpace(f"{path}: the disk filled up while {what} was written; {kept}") from error


@contextlib.contextmanager
def write_errors_in_words(path: Path, what: str, kept: str) -> Iterator[None]:
    """Turn whatever the system refuses inside the block, which only writes, into `UserError`.

    Args:
        path: What is being written.
        what: Says what it is, see `full_disk_as_user_error`.
        kept: What the user still has.
    """
    try:
        with full_disk_as_user_error(path, what, kept):
            yield
    except OSError as error:
        raise UserError(f"{path}: {what} could not be written: {error.strerror or error}; {kept}") from error


def _nearest_existing(path: Path) -> Path:
    absolute = path.absolute()
    return next(place for place in (absolute, *absolute.parents) if place.exists())


def _gib(size: int) -> str:
    return f"{size / GIB:.2f} GiB" if size >= GIB / 10 else f"{size / 1024**2:.2f} MiB"
