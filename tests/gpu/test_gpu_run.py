"""Whole tiny runs on the devices: the same losses as on the CPU, resumed on other devices."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_runs import ITS_CLIPS, T2V, Watcher, losses_of, tiny_config, tiny_model
from torch import Tensor

from tworeel.cache.build import build_cache
from tworeel.cache.store import CacheStore
from tworeel.config.schema import RunConfig
from tworeel.demo.clips import write_clips
from tworeel.lora.files import load_lora
from tworeel.lora.naming import Naming
from tworeel.models.wan.family import WAN
from tworeel.training.preflight import preflight
from tworeel.training.report import SilentRun
from tworeel.training.run import train

pytestmark = pytest.mark.gpu


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Has clips in `clips`; runs lie beside them and share a cache."""
    write_clips(tmp_path / "clips", count=2)
    return tmp_path


def config_of(folder: Path, name: str, devices: list[torch.device], variant: str = T2V) -> RunConfig:
    """Four steps of two micro-batches on these devices."""
    model = tiny_model(folder / "model", variant)
    engine: dict[str, Any] = {"devices": tuple(map(str, devices))}
    return tiny_config(model, folder / "clips", folder / name, data=ITS_CLIPS, engine=engine)


def lora_of(config: RunConfig) -> dict[str, Tensor]:
    """The two matrices of each layer."""
    modules = load_lora(config.train.output / "lora.safetensors", Naming.of(WAN)).modules
    return {f"{name}.{part}": getattr(m, part) for name, m in modules.items() for part in ("down", "up")}


@pytest.mark.parametrize("variant", ["wan2.2-t2v-a14b", "wan2.2-ti2v-5b", "wan2.1-i2v-14b"])
def test_a_run_has_the_losses_of_the_same_run_on_the_cpu(
    folder: Path, devices: list[torch.device], variant: str
) -> None:
    cpu = [torch.device("cpu")] * 2
    train(theirs := config_of(folder, "cpu", cpu, variant))  # encodes too, so that both see the same latents
    watcher = Watcher()
    train(ours := config_of(folder, "gpu", devices, variant), observer=watcher)
    expected = [loss for _, loss, _ in losses_of(theirs)]
    assert [loss for _, loss, _ in losses_of(ours)] == pytest.approx(expected, rel=5e-3)
    assert all(tensor.isfinite().all() for tensor in lora_of(ours).values())
    for report in watcher.steps:
        assert set(report.memory) == set(map(str, devices))
        assert all(size > 0 for size in report.memory.values())
        assert len(report.busy) == 2 and all(0 < share <= 1 for share in report.busy)


def test_a_run_is_resumed_on_other_devices(folder: Path, devices: list[torch.device]) -> None:
    whole = config_of(folder, "whole", devices)
    train(whole)
    begun = config_of(folder, "begun", [torch.device("cpu")] * 2)
    train(begun.model_copy(update={"train": begun.train.model_copy(update={"steps": 2})}))
    train(config_of(folder, "begun", devices), resume=True)
    assert [loss for _, loss, _ in losses_of(begun)] == pytest.approx(
        [loss for _, loss, _ in losses_of(whole)], rel=5e-3
    )


def test_bfloat16_trains(folder: Path, devices: list[torch.device]) -> None:
    config = config_of(folder, "run", devices)
    config = config.model_copy(update={"model": config.model.model_copy(update={"dtype": "bfloat16"})})
    train(config)
    lora = lora_of(config)
    assert all(tensor.isfinite().all() and tensor.any() for tensor in lora.values())


def test_encoders_on_a_gpu_find_what_they_find_on_the_cpu(folder: Path, gpu: torch.device) -> None:
    config = config_of(folder, "run", [gpu, gpu])
    job = preflight(config, SilentRun())
    found = []
    for device in ("cpu", gpu):
        store = CacheStore(folder / f"cache-{str(device).replace(':', '-')}")
        index = build_cache(store, job.family, job.source, job.clips, devices=[device], dtype=torch.float32)
        found.append([index.load(clip) for clip in job.clips])
    for ours, theirs in zip(*found, strict=True):
        for name in ("latents", "text"):
            # Convolutions round to TF32 by default.
            torch.testing.assert_close(ours[name], theirs[name], rtol=2e-2, atol=2e-2)
