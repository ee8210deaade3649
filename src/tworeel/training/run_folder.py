"""The folder of a run: where everything lies, and the lock that lets one process write there."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

from filelock import FileLock, Timeout

from tworeel.errors import UserError
from tworeel.files import write_text_atomic

LONGEST_NAME = 200
"""Bytes: file systems take 255, and what is exported on the way has a number and an ending."""


class RunFolder:
    """Paths of a run.

    ```
    config.toml          the resolved configuration
    plan.json            what was planned for the devices, where they are GPUs
    run.lock, run.pid    held while a process writes here, and which process that is
    metrics.jsonl        one line a step
    tensorboard/         the same for TensorBoard
    checkpoints/         what a resume starts from
    samples/             previews, a folder each
    <name>.safetensors   the finished LoRA
    ```
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config = path / "config.toml"
        self.plan = path / "plan.json"
        self.lock = path / "run.lock"
        self.pid = path / "run.pid"
        self.metrics = path / "metrics.jsonl"
        self.tensorboard = path / "tensorboard"
        self.checkpoints = path / "checkpoints"

    def lora(self, name: str) -> Path:
        """Return where the LoRA `name` goes.

        Raises:
            UserError: `name` is empty, too long, or leads out of the folder.
        """
        if not name or Path(name).name != name or "\\" in name:
            raise UserError(f"train.name = {name!r}: must be a plain file name without folders or ending")
        if len(name.encode()) > LONGEST_NAME:
            raise UserError(f"train.name = {name!r}: must be of {LONGEST_NAME} bytes at most")
        return self.path / f"{name}.safetensors"

    def loras(self, name: str) -> list[Path]:
        """Return the LoRA `name` and what was exported of it on the way, as far as they are there."""
        found = self.path.glob("*.safetensors")
        return sorted(p for p in found if p.stem == name or p.stem.startswith(f"{name}-"))

    def samples(self, step: int) -> Path:
        """Return where the previews of a step go."""
        return self.path / "samples" / f"step-{step:06d}"

    def create(self) -> None:
        """Make the folder if it is missing, and see that files can be made in it.

        Raises:
            UserError: See `make_writable`.
        """
        make_writable(self.path, "a run")

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Create the folder and hold its lock; the system releases the lock of a process that dies.

        Raises:
            UserError: Another run writes there, or the folder cannot be used (see `create`).
        """
        self.create()
        lock = FileLock(self.lock, blocking=False)
        try:
            lock.acquire()
        except Timeout:
            raise UserError(f"another run is writing to {self.path}{self._holder()}") from None
        try:
            # Beside the lock, because Windows lets nobody read a file that is locked
            write_text_atomic(self.pid, str(os.getpid()))
            yield
        finally:
            self.pid.unlink(missing_ok=True)
            lock.release()

    def _holder(self) -> str:
        """Return `" (process 123)"`, or nothing if the process has not said yet."""
        try:
            return f" (process {int(self.pid.read_text(encoding='utf-8'))})"
        except (OSError, ValueError):
            return ""


def make_writable(folder: Path, what: str) -> None:
    """Make a folder if it is missing, and see that files can be made in it.

    Args:
        folder: its path.
        what: What is to be written there, for example `"a run"`.

    Raises:
        UserError: A file is in the way, or the folder cannot be made or written to.
    """
    require_no_file(folder, what)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise UserError(f"{folder}: cannot write {what} there: {error.strerror}") from error


def require_no_file(folder: Path, what: str) -> None:
    """Raise `UserError` if there is a file where a folder, or one above it, has to be; nothing is made.

    Args:
        folder: its path.
        what: What is to be written there, for example `"a run"`.
    """
    there = _nearest(folder)
    if there and not there.is_dir():
        where = "" if there == folder else f"{folder}: "
        raise UserError(f"{where}{there} is a file; {what} needs a folder")


def require_writable(folder: Path, what: str) -> None:
    """Raise `UserError` if a folder could not be made or written to, as far as one can tell without doing it.

    Args:
        folder: its path.
        what: What is to be written there, for example `"a run"`.
    """
    require_no_file(folder, what)
    there = _nearest(folder)
    if there and not os.access(there, os.W_OK | os.X_OK):
        raise UserError(f"{folder}: cannot write {what} there: no permission to write to {there}")


def _nearest(folder: Path) -> Path | None:
    """The folder, or the nearest one above it that is there."""
    return next((path for path in (folder, *folder.parents) if path.exists()), None)
