"""What a configuration leaves open is decided once, and stays so when the run goes on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tiny_runs import Watcher, tiny_config, tiny_model

from tworeel.config import load_config
from tworeel.config.schema import ModelConfig, RunConfig
from tworeel.demo.clips import write_clips
from tworeel.training.choices import as_before, settled, stages_per_device
from tworeel.training.run import train


def config_of(folder: Path, model: ModelConfig | None = None, **engine: Any) -> RunConfig:
    """With precision and stages left open."""
    model = model or ModelConfig(path="model")
    chosen = model.model_copy(update={"quantize": "auto"})
    engine = {"stages_per_device": "auto"} | engine
    return tiny_config(chosen, folder / "clips", folder / "run", engine=engine)


def test_what_is_open_is_settled_as_decided(tmp_path: Path) -> None:
    config = config_of(tmp_path)
    assert stages_per_device(config) == 1
    found = settled(config, "fp8", 2)
    assert (found.model.quantize, found.engine.stages_per_device) == ("fp8", 2)
    assert settled(found, "int8", 1) == found
    undecided = settled(config)
    assert (undecided.model.quantize, undecided.engine.stages_per_device) == (None, 1)


@pytest.mark.parametrize(("devices", "stages"), [(("cpu", "cpu"), 2), (("cpu",), "auto")])
def test_a_resumed_run_has_the_precision_that_it_had_and_on_the_same_devices_its_stages(
    tmp_path: Path, devices: tuple[str, ...], stages: object
) -> None:
    before = settled(config_of(tmp_path), "int8", 2).model_dump(mode="json")
    found = as_before(config_of(tmp_path, devices=devices), before)
    assert found.model.quantize == "int8" and found.engine.stages_per_device == stages


def test_what_is_set_is_not_taken_from_the_run_before(tmp_path: Path) -> None:
    before = settled(config_of(tmp_path), "int8", 2).model_dump(mode="json")
    config = settled(config_of(tmp_path), "fp8", 1)
    assert as_before(config, before) == config


def test_a_run_writes_down_what_was_decided_and_goes_on_with_it(tmp_path: Path) -> None:
    write_clips(tmp_path / "clips", 2)
    model = tiny_model(tmp_path / "model")
    first = config_of(tmp_path, model)
    train(first.model_copy(update={"train": first.train.model_copy(update={"steps": 2})}))
    written = load_config(tmp_path / "run" / "config.toml", {})
    assert (written.model.quantize, written.engine.stages_per_device) == (None, 1)
    watcher = Watcher()
    train(first, resume=True, observer=watcher)
    assert not any("changed since" in line for line in watcher.lines)
