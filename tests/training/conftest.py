"""A disk that is easily full, and tiny models and clips for whole runs."""

from __future__ import annotations

import functools
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tworeel.config.schema import ModelConfig, RunConfig
from tworeel.demo.clips import write_clips

sys.path.insert(0, str(Path(__file__).parent))  # for tiny_runs
from tiny_runs import T2V, tiny_config, tiny_model

MakeModel = Callable[..., ModelConfig]
MakeConfig = Callable[..., RunConfig]


@pytest.fixture
def tiny_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 1 MiB; skips where none can be mounted (needs root on Linux)."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if shutil.which("mount") is None:
        pytest.skip("no mount command")
    command = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(disk)]
    if subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("may not mount a file system")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


@pytest.fixture(scope="session")
def make_model(tmp_path_factory: pytest.TempPathFactory) -> MakeModel:
    """A function (variant, layout, **options of the checkpoint) -> model; each is written once."""

    @functools.cache
    def make(variant: str = T2V, layout: str = "native", **options: Any) -> ModelConfig:
        return tiny_model(tmp_path_factory.mktemp("model"), variant, layout, **options)

    return make


@pytest.fixture(scope="session")
def clips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two clips and a still with captions; the cache beside them is shared by all runs."""
    folder = tmp_path_factory.mktemp("data") / "clips"
    write_clips(folder, count=2)
    return folder


@pytest.fixture
def make_config(make_model: MakeModel, clips: Path, tmp_path: Path) -> MakeConfig:
    """A function (output's name, model=…, **sections) -> configuration of a tiny run."""

    def make(name: str = "run", model: ModelConfig | None = None, **sections: Any) -> RunConfig:
        return tiny_config(model or make_model(), clips, tmp_path / name, **sections)

    return make
