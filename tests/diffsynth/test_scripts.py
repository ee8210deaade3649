"""Whole runs of training scripts, on the CPU: plain, through us but off, and split."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny import (
    BLOCKS,
    arguments,
    arguments_with_encoders,
    write,
    write_flux2,
    write_with_encoders,
)

from tworeel.demo.tiny_encoders import write_tokenizer

HERE = Path(__file__).parent
EXAMPLES = Path(os.environ.get("DIFFSYNTH_REPOSITORY", "")) / "examples"
OWN = EXAMPLES / "wanvideo" / "model_training" / "train.py"
OWN_FLUX2 = EXAMPLES / "flux2" / "model_training" / "train.py"
SCRIPTS = [
    HERE / "script.py",
    pytest.param(OWN, marks=pytest.mark.skipif(not OWN.is_file(), reason="DIFFSYNTH_REPOSITORY is not set")),
]
SPLIT = {"DIFFSYNTH_DUAL_GPU": "true", "DIFFSYNTH_DUAL_GPU_DEVICES": "cpu,cpu"}
Result = tuple[list[float], dict[str, torch.Tensor]]
pytestmark = pytest.mark.usefixtures("diffsynth_package")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny")
    write(folder)
    write_tokenizer(folder, "diffusers")
    return folder


def run(
    way: str, folder: Path, script: Path, args: list[str], environment: Mapping[str, str] = {}
) -> subprocess.CompletedProcess[str]:
    """Run a script in a process of its own, with the CPU as accelerate's device."""
    inherited = {key: value for key, value in os.environ.items() if not key.startswith("DIFFSYNTH_")}
    inherited |= {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    command = [sys.executable, str(HERE / "tiny.py"), way, str(folder), str(script), *args]
    return subprocess.run(
        command, env=inherited | dict(environment), capture_output=True, text=True, check=False, timeout=200
    )


def trained(
    done: subprocess.CompletedProcess[str], output: Path
) -> tuple[list[float], dict[str, torch.Tensor]]:
    """The losses and the last LoRA of a run."""
    assert done.returncode == 0, done.stderr[-3000:]
    lines = (output / "loss.csv").read_text(encoding="utf-8").splitlines()[1:]
    return [float(line.split(",")[2]) for line in lines], load_file(output / "epoch-1.safetensors")


@pytest.fixture(scope="module")
def plain(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[Path, int], Result]:
    """Runs a script without us, once for each number of micro-batches a step."""

    @cache
    def run_plain(script: Path, accumulation: int) -> Result:
        output = tmp_path_factory.mktemp("plain")
        return trained(
            run("plain", folder, script, arguments(folder, output, *steps_of(accumulation))), output
        )

    return run_plain


def steps_of(accumulation: int) -> list[str]:
    return ["--gradient_accumulation_steps", str(accumulation)]


@pytest.mark.parametrize("script", SCRIPTS)
def test_with_the_variable_unset_a_run_is_bitwise_what_it_is_without_us(
    folder: Path, tmp_path: Path, script: Path, plain: Callable[[Path, int], Result]
) -> None:
    done = run("tworeel", folder, script, arguments(folder, tmp_path, *steps_of(1)))
    (losses, lora), (our_losses, our_lora) = plain(script, 1), trained(done, tmp_path)
    assert len(losses) == 12 and losses == our_losses
    assert lora.keys() == our_lora.keys() and all(torch.equal(lora[key], our_lora[key]) for key in lora)
    rooms = done.stdout.rpartition("rooms:")[2].split()
    assert not [name for name in rooms if name.startswith(("tworeel.engine", "tworeel.diffsynth.launching"))]


@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize("accumulation", [1, 4])
def test_a_split_run_has_the_losses_and_the_lora_of_one_that_is_not(
    folder: Path,
    tmp_path: Path,
    script: Path,
    accumulation: int,
    plain: Callable[[Path, int], Result],
) -> None:
    done = run("tworeel", folder, script, arguments(folder, tmp_path, *steps_of(accumulation)), SPLIT)
    (losses, lora), (our_losses, our_lora) = plain(script, accumulation), trained(done, tmp_path)
    assert f"blocks 0 to {BLOCKS // 2 - 1} on cpu" in done.stdout
    assert len(losses) == 12 and our_losses == pytest.approx(losses, rel=1e-5)
    assert lora.keys() == our_lora.keys() and len(lora) == BLOCKS * 10 * 2
    for key, tensor in lora.items():
        assert (our_lora[key] - tensor).abs().max() <= 1e-3 * tensor.abs().max(), key


@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize(("accumulation", "text_encoder"), [(1, "device"), (2, "host")])
def test_clips_and_captions_that_are_encoded_on_the_fly_train_as_without_us(
    tmp_path: Path, script: Path, accumulation: int, text_encoder: str
) -> None:
    split = SPLIT | {"DIFFSYNTH_DUAL_GPU_TEXT_ENCODER": text_encoder}
    write_with_encoders(tmp_path)
    write_tokenizer(tmp_path, "diffusers")
    results = []
    for way, variables in (("plain", {}), ("tworeel", split)):
        words = arguments_with_encoders(tmp_path, tmp_path / way, *steps_of(accumulation))
        done = run(way, tmp_path, script, words, variables)
        results.append(trained(done, tmp_path / way))
    assert ("wait in host memory" in done.stdout) == (text_encoder == "host")
    (losses, lora), (our_losses, our_lora) = results
    assert len(losses) == 8 and our_losses == pytest.approx(losses, rel=1e-5)
    assert lora.keys() == our_lora.keys() and len(lora) == BLOCKS * 10 * 2
    for key, tensor in lora.items():
        assert (our_lora[key] - tensor).abs().max() <= 1e-3 * tensor.abs().max(), key


@pytest.mark.skipif(not OWN_FLUX2.is_file(), reason="DIFFSYNTH_REPOSITORY is not set")
@pytest.mark.parametrize("accumulation", [1, 4])
def test_flux2s_own_script_split_has_the_losses_of_one_that_is_not(
    tmp_path_factory: pytest.TempPathFactory, tmp_path: Path, accumulation: int
) -> None:
    folder = tmp_path_factory.mktemp("flux2")
    write_flux2(folder)
    write_tokenizer(folder, "diffusers")
    more = ["--lora_target_modules", "to_q,to_k,to_v,to_out.0,to_qkv_mlp_proj", *steps_of(accumulation)]
    results = []
    for way, variables in (("plain", {}), ("tworeel", SPLIT)):
        done = run(way, folder, OWN_FLUX2, arguments(folder, tmp_path / way, *more), variables)
        results.append(trained(done, tmp_path / way))
    (losses, lora), (our_losses, our_lora) = results
    assert len(losses) == 12 and our_losses == pytest.approx(losses, rel=1e-5)
    assert lora.keys() == our_lora.keys() and len(lora) > 20
