"""Whole runs of a tiny FLUX.2 with reference images: from files on disk to a LoRA."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from tworeel.config.schema import RunConfig
from tworeel.demo.flux2_checkpoint import write_flux2_checkpoint
from tworeel.errors import UserError
from tworeel.training.assembly import cache_clips, make_micro_batches
from tworeel.training.metrics import read_metrics
from tworeel.training.preflight import preflight
from tworeel.training.report import SilentRun
from tworeel.training.run import train

VARIANTS = ("flux2-dev", "flux2-klein-4b")


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two pictures of different shapes, one with one and one with two reference images."""
    folder = tmp_path_factory.mktemp("data")
    generator = np.random.default_rng(0)
    for name, (width, height) in {"a": (96, 64), "b": (64, 96), "c": (80, 64), "d": (160, 80)}.items():
        pixels = generator.integers(0, 256, (height, width, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{name}.png")
    rows = [
        {"image": "a.png", "prompt": "first", "edit_image": "c.png"},
        {"image": "b.png", "prompt": "the second", "edit_image": ["d.png", "c.png"]},
        {"image": "c.png", "prompt": "without a reference"},
    ]
    table = folder / "data.jsonl"
    table.write_text("\n".join(map(json.dumps, rows)) + "\n", encoding="utf-8")
    return table


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Single files of both kinds of models, with their encoders beside them."""
    return {
        variant: write_flux2_checkpoint(
            tmp_path_factory.mktemp(variant), variant=variant, layout="comfyui", dtype=torch.float32
        )
        for variant in VARIANTS
    }


def config_of(path: Path, data: Path, output: Path, **sections: Any) -> RunConfig:
    small: dict[str, Any] = {
        "model": {"path": str(path), "dtype": "float32"},
        "data": {"sources": ({"path": data},), "resolution": (64, 64)},
        "cache": {"folder": data.parent / "cache", "dtype": "float32"},
        "lora": {"rank": 2},
        "train": {
            "output": output,
            "steps": 2,
            "micro_batches": 3,
            "save_every": 2,
            "learning_rate": 1e-3,
            "tensorboard": False,
        },
        "engine": {"devices": ("cpu", "cpu")},
    }
    return RunConfig.model_validate(
        {name: section | sections.get(name, {}) for name, section in small.items()}
    )


@pytest.mark.parametrize("variant", VARIANTS)
def test_runs_over_any_number_of_stages_are_bitwise_equal(models, images, tmp_path, variant):
    trained = []
    for devices in (("cpu",), ("cpu",) * 2, ("cpu",) * 4):
        output = tmp_path / f"stages{len(devices)}"
        train(config_of(models[variant], images, output, engine={"devices": devices}))
        losses = [line["loss"] for line in read_metrics(output / "metrics.jsonl")]
        trained.append((losses, load_file(output / "lora.safetensors")))

    losses, lora = trained[0]
    assert len(losses) == 2
    assert all(np.isfinite(losses))
    assert any(tensor.abs().max() > 0 for name, tensor in lora.items() if "lora_B" in name or "up" in name)
    for other_losses, other in trained[1:]:
        assert other_losses == losses
        assert all(torch.equal(other[name], tensor) for name, tensor in lora.items())


@pytest.mark.parametrize("quantize", ["fp8", "int8"])
def test_weights_that_a_file_fuses_can_be_kept_in_8_bits(models, images, tmp_path, quantize):
    train(config_of(models["flux2-dev"], images, tmp_path, model={"quantize": quantize}))

    exact = tmp_path / "exact"
    train(config_of(models["flux2-dev"], images, exact, train={"output": exact}))
    rounded, whole = (
        [line["loss"] for line in read_metrics(folder / "metrics.jsonl")] for folder in (tmp_path, exact)
    )
    assert rounded == pytest.approx(whole, rel=0.05)
    assert rounded != whole


def test_a_batch_shows_the_references_of_its_image(models, images, tmp_path):
    config = config_of(models["flux2-dev"], images, tmp_path)
    job = preflight(config, SilentRun())
    batches = make_micro_batches(config, job, cache_clips(config, job, SilentRun())).of_step(0)

    own = {"0/a.png": 4 * 5, "0/b.png": 5 * 4, "0/c.png": 4 * 5}
    shown = {"0/a.png": 4 * 5, "0/b.png": 5 * 10 + 4 * 5, "0/c.png": 0}
    for batch in batches:
        ids = batch.sample.inputs["img_ids"][0]
        references = (ids[:, 0] > 0).sum()
        assert references == shown[batch.clip]
        assert batch.sample.target.shape[1] == len(ids) - references
        assert abs(batch.sample.target.shape[1] - own[batch.clip]) <= 5


def test_reference_images_may_be_left_out(models, images, tmp_path):
    config = config_of(
        models["flux2-dev"], images, tmp_path, train={"output": tmp_path, "condition_on_image": False}
    )
    job = preflight(config, SilentRun())
    batches = make_micro_batches(config, job, cache_clips(config, job, SilentRun())).of_step(0)

    assert all(not batch.sample.inputs["img_ids"][..., 0].any() for batch in batches)


def test_the_schedule_is_that_of_the_family_unless_another_is_set(models, images, tmp_path):
    shifts = []
    for train_options in ({}, {"shift": 3.0}):
        config = config_of(
            models["flux2-klein-4b"], images, tmp_path, train={"output": tmp_path} | train_options
        )
        job = preflight(config, SilentRun())
        levels = make_micro_batches(config, job, cache_clips(config, job, SilentRun())).levels
        shifts.append(round(levels.shift, 4))
    assert shifts == [2.2255, 3.0]


def test_everything_that_is_wrong_is_said_at_once(models, images, tmp_path):
    rows = [{"image": "a.png", "prompt": "x", "control_path": "gone.png"}]
    table = images.parent / "wrong.jsonl"
    table.write_text(json.dumps(rows[0]), encoding="utf-8")
    config = config_of(
        models["flux2-dev"], table, tmp_path, lora={"targets": "everything"}, engine={"devices": ("cpu",) * 9}
    )
    with pytest.raises(UserError) as caught:
        preflight(config, SilentRun())
    text = str(caught.value)
    assert "'gone.png' does not exist" in text
    assert "lora.targets = 'everything': no preset of flux2; allowed are attention, all-linear" in text
    assert "engine: " in text
