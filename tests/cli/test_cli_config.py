from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from tworeel.config import load_config

Run = Callable[..., Any]


def test_a_configuration_is_written_once_and_loads(
    run: Run, tiny_model: Path, clips: Path, tmp_path: Path
) -> None:
    file = tmp_path / "run.toml"
    done = run("config", file, "--model", tiny_model, "--data", clips)
    assert done.code == 0, done.err
    assert "The model is wan2.1-t2v-1.3b" in file.read_text(encoding="utf-8")
    config = load_config(file, {})
    assert (config.model.path, config.data.sources[0].path) == (str(tiny_model), clips)
    assert run("config", file).code == 2


def test_without_a_file_it_is_shown(run: Run, tmp_path: Path) -> None:
    done = run("config", "--model", "org/wan", "--data", "clips")
    assert done.code == 0
    assert 'path = "org/wan"' in done.out and 'path = "clips"' in done.out
    assert not list(tmp_path.iterdir())


def test_a_model_that_is_incomplete_still_gets_its_configuration(run: Run, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    done = run("config", "--model", "empty")
    assert done.code == 0
    assert done.err.startswith("warning: ")
    assert str(tmp_path / "empty") in done.out
