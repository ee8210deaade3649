from __future__ import annotations

import logging
import sys
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tworeel.cli.app import main
from tworeel.demo.checkpoint import write_checkpoint
from tworeel.demo.clips import write_clips


@dataclass(frozen=True)
class Done:
    """What a command left: its exit code and what it wrote."""

    code: int
    out: str
    err: str


Run = Callable[..., Done]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Iterator[Run]:
    """Runs `tworeel` with arguments in an empty folder, as the installed program does."""
    monkeypatch.chdir(tmp_path)
    root = logging.getLogger()
    before, level = list(root.handlers), root.level

    def run_command(*arguments: str | Path) -> Done:
        monkeypatch.setattr(sys, "argv", ["tworeel", *map(str, arguments)])
        with pytest.raises(SystemExit) as exit_, warnings.catch_warnings():
            main()
        assert isinstance(exit_.value.code, int)
        return Done(exit_.value.code, *capsys.readouterr())

    yield run_command
    logging.captureWarnings(False)
    root.handlers[:] = before
    root.setLevel(level)


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Wan 2.1 checkpoint."""
    return write_checkpoint(tmp_path_factory.mktemp("model"), variant="wan2.1-t2v-1.3b")


@pytest.fixture(scope="session")
def clips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with two short clips and an image."""
    folder = tmp_path_factory.mktemp("clips")
    write_clips(folder, 2)
    return folder


@pytest.fixture
def small_run(tiny_model: Path, clips: Path) -> list[str]:
    """Options of a run that takes a second."""
    settings = {
        "data.resolution": "[128,96]",
        "data.frames": "[1,5]",
        "train.micro_batches": "2",
        "train.tensorboard": "false",
        "lora.rank": "2",
    }
    given = [part for key, value in settings.items() for part in ("--set", f"{key}={value}")]
    return ["--model", str(tiny_model), "--data", str(clips), "--devices", "cpu,cpu", *given]
