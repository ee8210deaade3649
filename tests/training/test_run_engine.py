"""Whole runs under each engine setting: the same losses; what cannot be is told before a weight is read."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from shutil import copytree, ignore_patterns
from typing import Any

import pytest
from tiny_runs import Watcher, lora_of, losses_of, tiny_config, tiny_model

from tworeel.config.schema import ModelConfig, RunConfig, SourceConfig
from tworeel.demo.clips import write_clips
from tworeel.errors import UserError
from tworeel.training.run import train


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Has a model and clips; runs lie beside them and share a cache."""
    folder = tmp_path_factory.mktemp("runs")
    write_clips(folder / "clips", count=2)
    tiny_model(folder / "model")
    return folder


@pytest.fixture(scope="module")
def plain(folder: Path) -> RunConfig:
    """The run without any of these settings."""
    return run(folder, "plain")


def run(
    folder: Path, name: str, *, quantize: str | None = None, data: dict[str, Any] | None = None, **engine: Any
) -> RunConfig:
    """Train with these engine settings."""
    model = ModelConfig(path=str(folder / "model"), dtype="float32", quantize=quantize)
    output = Path(tempfile.mkdtemp(prefix=name, dir=folder)) / "run"
    config = tiny_config(model, folder / "clips", output, engine=engine, data=data or {})
    train(config, observer=Watcher())
    return config


@pytest.mark.parametrize(
    "engine",
    [
        {"residency": "selective"},
        {"residency": "offload-selective"},
        {"residency": "recompute", "streamed_blocks": (1, 2)},
        {"slack": 0},
        {"devices": ("cpu",), "stages_per_device": 2},
    ],
)
def test_no_engine_setting_changes_a_bit_of_the_result(
    folder: Path, plain: RunConfig, engine: dict[str, Any]
) -> None:
    other = run(folder, "other", **engine)
    assert losses_of(other) == losses_of(plain)
    expected = lora_of(plain)
    assert all(tensor.equal(expected[name]) for name, tensor in lora_of(other).items())


@pytest.mark.slow
def test_a_compiled_run_has_the_losses_of_the_plain_one(folder: Path) -> None:
    # Of one shape, without the image: each further one is compiled, see tests/engine/test_compiling.py.
    alike = copytree(folder / "clips", folder / "alike", ignore=ignore_patterns("image.*"))
    data = {"sources": (SourceConfig(path=alike),), "frames": (5,), "min_aspect": 1.0, "max_aspect": 1.0}
    plain, compiled = run(folder, "plain", data=data), run(folder, "compiled", data=data, compile=True)
    expected = [loss for _, loss, _ in losses_of(plain)]
    assert [loss for _, loss, _ in losses_of(compiled)] == pytest.approx(expected, rel=1e-4)


def test_what_is_compiled_is_kept_beside_the_cache_of_the_dataset(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR")
    run(folder, "run")
    assert Path(os.environ["TORCHINDUCTOR_CACHE_DIR"]) == folder / "cache" / "compiled"


@pytest.mark.parametrize(("kind", "relative"), [("fp8", 0.05), ("int8", 0.02), ("nf4", 0.2)])
def test_a_quantized_model_trains_with_about_the_losses_of_the_plain_one(
    folder: Path, plain: RunConfig, kind: str, relative: float
) -> None:
    quantized = run(folder, kind, quantize=kind)
    expected = [loss for _, loss, _ in losses_of(plain)]
    assert [loss for _, loss, _ in losses_of(quantized)] == pytest.approx(expected, rel=relative)
    assert losses_of(quantized) != losses_of(plain)


def test_streamed_weights_of_a_quantized_model_train_too(folder: Path) -> None:
    whole = run(folder, "whole", quantize="int8")
    streamed = run(folder, "streamed", quantize="int8", streamed_blocks=(2, 1))
    assert losses_of(streamed) == losses_of(whole)


@pytest.mark.parametrize(
    ("engine", "message"),
    [
        ({"streamed_blocks": (9, 0)}, r"engine\.streamed_blocks = \[9, 0\]: stage 0 has 2 blocks"),
        ({"streamed_blocks": (1,)}, "2 stages need as many numbers"),
        ({"stages_per_device": 3}, "6 stages for 4 blocks"),
    ],
)
def test_what_the_engine_cannot_do_is_told_before_the_model_is_read(
    folder: Path, engine: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        run(folder, "run", **engine)
