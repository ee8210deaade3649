"""Checkpoints of a run: whole or absent, verified to the last byte, and never silently passed over.

A checkpoint is a folder of safetensors and JSON files:

```
checkpoints/step-00000100/
  lora.safetensors, optimizer.safetensors    one file a group of tensors
  state.json                                 everything else
  manifest.json                              format, step, size and SHA-256 of each file, its own digest
```

It is written under a `.tmp-` name, flushed to the disk and then renamed. One process writes at a time: the
caller holds the lock of the run's folder (`tworeel.training.run_folder`).
"""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
from torch import Tensor

from tworeel.files import TEMPORARY_PREFIX, fsync_folder, remove
from tworeel.training.manifest import (
    STATE,
    TENSORS_SUFFIX,
    CheckpointError,
    read_files,
    read_manifest,
    write_files,
)
from tworeel.training.space import require_space, write_errors_in_words

_STEP_NAME = re.compile(r"step-(\d{8,})")
_GROUP_NAME = re.compile(r"[a-z0-9_]+")
_REPLACED_PREFIX = ".replaced-"
_SET_ASIDE_PREFIX = "set-aside-"
_SLACK = 1024**2
"""Bytes for headers, manifest and folder."""


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """What was saved, verified, on the CPU."""

    path: Path
    step: int
    tensors: dict[str, dict[str, Tensor]]
    """By group and name."""
    state: dict[str, Any]
    """Plain JSON: numbers come back exactly."""


class CheckpointStore:
    """The checkpoints in one folder."""

    def __init__(self, folder: Path, keep: int = 2) -> None:
        assert keep >= 2, "the newest checkpoint may be damaged: at least two are kept"
        self.folder = folder
        self.keep = keep

    def save(self, step: int, tensors: Mapping[str, Mapping[str, Tensor]], state: Mapping[str, Any]) -> Path:
        """Write the checkpoint of `step`, then remove all but the newest `keep`; return its folder.

        A checkpoint of the same step is replaced, those of later steps are set aside (`set_aside_after`).

        Args:
            step: Optimizer steps done.
            tensors: By group (its file's name) and name; on any device.
            state: Plain JSON with string keys and finite numbers.

        Raises:
            OutOfSpace: The disk is (or would be) full. What was there before is untouched.
            ValueError: `state` would not come back as it is.
        """
        assert all(_GROUP_NAME.fullmatch(group) for group in tensors), "groups are names of files"
        plain_state = _encode_exactly(state)
        size = sum(t.nbytes for group in tensors.values() for t in group.values()) + len(plain_state)
        self.folder.mkdir(parents=True, exist_ok=True)
        self._tidy()
        require_space(self.folder, size + _SLACK, f"the checkpoint of step {step}")
        target = self.folder / _step_name(step)
        with self._temporary(target) as temporary:
            write_files(temporary, step, tensors, plain_state)
            self.set_aside_after(step)
            self._rename(temporary, target)
        self._prune(newest=step)
        return target

    def load(self, path: Path) -> Checkpoint:
        """Return the checkpoint in the folder `path`, verified.

        Raises:
            CheckpointError: A line for each file that is missing, extra or damaged.
        """
        step, entries = read_manifest(path)
        named = _STEP_NAME.fullmatch(path.name.removeprefix(_REPLACED_PREFIX))
        if named and int(named[1]) != step:
            raise CheckpointError(f"{path}: holds step {step}; was it renamed?")
        files = dict(_parsed(name, data) for name, data in read_files(path, entries))
        return Checkpoint(path=path, step=step, state=files.pop(STATE), tensors=files)

    def steps(self) -> list[int]:
        """Return the steps that have a checkpoint, intact or not, in rising order."""
        return sorted(self._found())

    def set_aside(self) -> list[Path]:
        """Return the folders of checkpoints of courses that were given up, in the order of their names."""
        return sorted(path for path in self.folder.glob(f"{_SET_ASIDE_PREFIX}*") if path.is_dir())

    def newest_intact(self) -> tuple[Checkpoint | None, list[str]]:
        """Return the newest checkpoint that verifies, and one line on each newer one that does not.

        Returns:
            None only where there is no checkpoint at all.

        Raises:
            CheckpointError: There are checkpoints, but none is intact.
        """
        skipped: list[str] = []
        for _, path in sorted(self._found().items(), reverse=True):
            try:
                return self.load(path), skipped
            except CheckpointError as error:
                skipped += error.problems
        if skipped:
            raise CheckpointError(f"{self.folder}: no checkpoint is intact; nothing was resumed", *skipped)
        return None, []

    def set_aside_after(self, step: int) -> list[Path]:
        """Rename checkpoints later than `step`, of a course that is given up; return their new places.

        Resuming from an earlier checkpoint calls this: a later resume must not jump back to the old course.
        They stay on the disk under `set-aside-…` until the user removes them.
        """
        moved = []
        for later, path in self._found().items():
            if later > step:
                moved.append(_free_name(path.with_name(f"{_SET_ASIDE_PREFIX}{_step_name(later)}")))
                self._rename(path, moved[-1])
        return moved

    def _found(self) -> dict[int, Path]:
        """Folders by step; one that was being replaced counts until its successor is there."""
        found: dict[int, Path] = {}
        for prefix in (_REPLACED_PREFIX, ""):
            for path in self.folder.glob(f"{prefix}step-*"):
                if match := _STEP_NAME.fullmatch(path.name.removeprefix(prefix)):
                    found[int(match[1])] = path
        return found

    @contextlib.contextmanager
    def _temporary(self, target: Path) -> Iterator[Path]:
        temporary = target.with_name(f"{TEMPORARY_PREFIX}{target.name}")
        kept = "the earlier checkpoints are untouched"
        try:
            with write_errors_in_words(target, "the checkpoint", kept):
                temporary.mkdir()
                yield temporary
        finally:
            if temporary.exists():
                remove(temporary)

    def _rename(self, source: Path, target: Path) -> None:
        replaced = target.with_name(f"{_REPLACED_PREFIX}{target.name}")
        if target.exists():
            target.rename(replaced)
        source.rename(target)
        fsync_folder(self.folder)
        if replaced.exists():
            self._delete(replaced)

    def _prune(self, newest: int) -> None:
        for step in [step for step in self.steps() if step <= newest][: -self.keep]:
            self._delete(self.folder / _step_name(step))

    def _delete(self, path: Path) -> None:
        """Rename away first: a deletion that is cut short must not look like a damaged checkpoint."""
        doomed = path.with_name(f"{TEMPORARY_PREFIX}delete-{path.name}")
        path.rename(doomed)
        remove(doomed)

    def _tidy(self) -> None:
        """Remove what a process that was killed left behind, and finish or undo what it was replacing."""
        for path in self.folder.glob(f"{TEMPORARY_PREFIX}*step-*"):
            remove(path)
        for path in self.folder.glob(f"{_REPLACED_PREFIX}step-*"):
            successor = path.with_name(path.name.removeprefix(_REPLACED_PREFIX))
            if successor.exists():
                self._delete(path)
            else:
                path.rename(successor)


def _step_name(step: int) -> str:
    assert step >= 0
    return f"step-{step:08d}"


def _free_name(path: Path) -> Path:
    """Return `path`, or `path-2`, `path-3`, … if it is taken."""
    number, free = 1, path
    while free.exists():
        number += 1
        free = path.with_name(f"{path.name}-{number}")
    return free


def _parsed(name: str, data: bytes) -> tuple[str, Any]:
    """Name and content of a verified file: (`state.json`, state) or (group, tensors)."""
    if name == STATE:
        return name, json.loads(data)
    return name.removesuffix(TENSORS_SUFFIX), safetensors.torch.load(data)


def _encode_exactly(state: Mapping[str, Any]) -> bytes:
    text = json.dumps(dict(state), allow_nan=False, indent=1)
    if json.loads(text) != state:
        raise ValueError("the state would come back different: JSON has no tuples, and string keys only")
    return text.encode()
