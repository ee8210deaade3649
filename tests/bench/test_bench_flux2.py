"""The whole run with FLUX.2 runs as it is run by hand, at toy size."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from bench_scripts import read, run


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The folder of the whole benchmark, and what it printed."""
    folder = tmp_path_factory.mktemp("flux2")
    return folder, run("flux2_dev.py", "--folder", folder, "--devices", "cpu,cpu", "--quantize", "int8")


def test_flux2_is_measured_from_the_written_model_to_the_lora_and_the_captions(
    measured: tuple[Path, str],
) -> None:
    folder, printed = measured
    results = read(folder / "flux2_dev.json")
    assert list(results) == ["write", "run", "resume", "text"]
    assert [step["step"] for step in results["run"]["steps"]] == [1, 2, 3]
    assert [step["step"] for step in results["resume"]["steps"]] == [4]
    phases = [phase["name"] for phase in results["run"]["phases"]]
    assert phases == ["check", "cache", "load", "step 1", "step 2", "step 3", "checkpoint and LoRA"]
    assert results["run"]["lora_layers"] == 2 * 12 + 3 * 2
    assert 0 < results["run"]["load_host_peak"] < 8 * 2**30
    assert "the limit is 8.00 GiB: as it should be" in printed
    assert results["text"]["captions"] == 3 and "on the CPU" in results["text"]["where"]
    parts = [phase["name"] for phase in results["text"]["phases"]]
    assert parts == ["look", "load and first caption", "other captions"]


def test_only_the_layers_of_the_text_encoder_that_are_read_are_written(measured: tuple[Path, str]) -> None:
    folder = measured[0] / "model" / "text_encoder"
    index = json.loads((folder / "model.safetensors.index.json").read_text(encoding="utf-8"))
    layers = {key.split(".")[3] for key in index["weight_map"] if ".layers." in key}
    assert layers == {str(k) for k in range(30)}
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    assert config["text_config"]["num_hidden_layers"] == 32
