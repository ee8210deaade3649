"""What a run measured: one JSON object a line in `metrics.jsonl`, and the same for TensorBoard."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from tworeel.errors import UserError
from tworeel.files import write_bytes_atomic
from tworeel.training.space import write_errors_in_words

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter


class MetricsLog:
    """Appends to `metrics.jsonl`; a resumed run continues it as if it had never stopped."""

    def __init__(self, path: Path, resume_step: int = 0, tensorboard: Path | None = None) -> None:
        """Open the log, without the lines after `resume_step` that the resumed run writes again.

        Args:
            path: The file; it is created if it is missing.
            resume_step: The step of the checkpoint that the run starts from; 0 for a new run.
            tensorboard: Folder for TensorBoard's files; None writes none.

        Raises:
            UserError: A line that is not the last cannot be read.
        """
        self.path = path
        _cut(path, resume_step)
        self._file = path.open("ab", buffering=0)
        self._board = _open_board(tensorboard, resume_step) if tensorboard else None

    def write(self, step: int, values: Mapping[str, Any]) -> None:
        """Append the values of one step; those that are numbers go to TensorBoard too.

        Args:
            step: Optimizer steps done, counted from 1.
            values: Plain JSON by name; floats are written so that they read back exactly.

        Raises:
            ValueError: A number is not finite (the run stops before it would log one).
            OutOfSpace: The disk is full.
        """
        unwritten = memoryview((json.dumps({"step": step, **values}, allow_nan=False) + "\n").encode())
        with write_errors_in_words(self.path, "a line of metrics", "the checkpoints are intact"):
            while unwritten:  # a disk that is nearly full takes a part
                unwritten = unwritten[self._file.write(unwritten) :]
        if self._board is not None:
            for name, value in values.items():
                if isinstance(value, int | float) and not isinstance(value, bool):
                    self._board.add_scalar(name, value, step)

    def sync(self) -> None:
        """Wait until all lines are on the disk; before a checkpoint, so that a power cut loses none."""
        os.fsync(self._file.fileno())
        if self._board is not None:
            self._board.flush()

    def close(self) -> None:
        """Close the files."""
        self._file.close()
        if self._board is not None:
            self._board.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Return the lines of `metrics.jsonl`; a torn last one is left out, a missing file has none.

    Raises:
        UserError: A line that is not the last cannot be read.
    """
    return [values for _, values in _lines(path)]


def _cut(path: Path, resume_step: int) -> None:
    kept = b"".join(line for line, values in _lines(path) if values["step"] <= resume_step)
    if not path.exists() or kept != path.read_bytes():
        write_bytes_atomic(path, kept)


def _lines(path: Path) -> list[tuple[bytes, dict[str, Any]]]:
    """Each whole line with its values."""
    if not path.exists():
        return []
    whole, _, _torn = path.read_bytes().rpartition(b"\n")
    lines = whole.split(b"\n") if whole else []
    return [(line + b"\n", _parsed(path, number, line)) for number, line in enumerate(lines, 1)]


def _parsed(path: Path, number: int, line: bytes) -> dict[str, Any]:
    try:
        values = json.loads(line)
    except ValueError:
        values = None
    if not isinstance(values, dict) or not isinstance(values.get("step"), int):
        raise UserError(f"{path}: line {number} is damaged; remove that line to go on without it")
    return values


def _open_board(folder: Path, resume_step: int) -> SummaryWriter:
    from torch.utils.tensorboard import SummaryWriter  # takes a second; only who wants it pays

    return SummaryWriter(str(folder), purge_step=resume_step + 1)
