"""Rendering on the devices: as on the CPU, and without a trace in a run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_runs import T2V, digest_of, losses_of, tiny_config, tiny_model
from torch import Tensor

from tworeel.config.schema import RunConfig
from tworeel.demo.clips import write_clips
from tworeel.sampling.files import Sheet, write_takes
from tworeel.training.run import train
from tworeel.training.sample import sample

pytestmark = pytest.mark.gpu

SAMPLE = {"prompts": ("a red ball",), "steps": 6, "size": (64, 64), "frames": 5, "strengths": (0, 1)}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Has clips in `clips`; runs lie beside them and share a cache."""
    write_clips(tmp_path / "clips", count=2)
    return tmp_path


@pytest.fixture
def latents(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """What was rendered last, before it was decoded."""
    kept: list[Tensor] = []

    def keep(folder: Path, prompts: Any, takes: Any, found: list[Tensor], *rest: Any) -> Sheet:
        kept[:] = found
        return write_takes(folder, prompts, takes, found, *rest)

    monkeypatch.setattr("tworeel.training.sample.write_takes", keep)
    return kept


def config_of(
    folder: Path, name: str, devices: list[torch.device], variant: str = T2V, **sections: Any
) -> RunConfig:
    model = tiny_model(folder / "model", variant)
    engine = {"devices": tuple(map(str, devices)), **sections.pop("engine", {})}
    return tiny_config(model, folder / "clips", folder / name, engine=engine, **sections)


@pytest.mark.parametrize("variant", ["wan2.2-t2v-a14b", "wan2.2-ti2v-5b"])
def test_what_is_rendered_is_about_what_the_cpu_renders(
    folder: Path, devices: list[torch.device], latents: list[Tensor], variant: str
) -> None:
    cpu = config_of(
        folder, "run", [torch.device("cpu")], variant, sample=SAMPLE, train={"learning_rate": 2e-2}
    )
    train(cpu)
    sample(cpu, folder=folder / "cpu")
    expected = list(latents)
    sample(config_of(folder, "run", devices, variant, sample=SAMPLE), folder=folder / "gpu")
    for ours, theirs in zip(latents, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=5e-2, atol=5e-2)


@pytest.mark.parametrize("quantize", [None, "fp8", "int8", "nf4"])
@pytest.mark.parametrize("streamed", [None, (1, 1)])
def test_previews_change_no_bit_of_a_run(
    folder: Path, devices: list[torch.device], quantize: str | None, streamed: tuple[int, ...] | None
) -> None:
    if quantize == "nf4":
        pytest.importorskip("bitsandbytes")
    engine = {"attention": "deterministic", "residency": "recompute", "streamed_blocks": streamed}
    runs = []
    for name, asked in (("plain", {}), ("shown", {**SAMPLE, "every": 1})):
        config = config_of(folder, name, devices, sample=asked, engine=engine)
        changed = {"dtype": "bfloat16", "quantize": quantize}
        config = config.model_copy(update={"model": config.model.model_copy(update=changed)})
        train(config)
        runs.append(config)
    assert losses_of(runs[0]) == losses_of(runs[1])
    assert digest_of(runs[0]) == digest_of(runs[1])
    assert (folder / "shown" / "samples" / "step-000004" / "contact-sheet.png").is_file()
