"""Tworeel's own training and DiffSynth's: one checkpoint, clip, noise and timestep, one loss and gradient.

What differs between the two is named here, and `docs/diffsynth.md` says it:

- the weight of a timestep's loss: DiffSynth's is Tworeel's `timestep_sampling = "bell"`; the default,
  `uniform`, has the weight 1;
- the angles of Wan's timestep embedding: diffusers computes them in fp32, DiffSynth in fp64;
- in bf16 DiffSynth rounds the timestep.
"""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from our_training import trained_by_tworeel
from same_case import KINDS, WIDTH_OF_CLIP, Trained, make_case, schedule
from their_training import trained_by_diffsynth
from torch import Tensor

pytestmark = pytest.mark.usefixtures("diffsynth_package")


@pytest.fixture(autouse=True)
def _clip_as_wide_as_diffsynth_takes_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tworeel.demo.tiny_transformer.IMAGE_WIDTH", WIDTH_OF_CLIP)


@pytest.fixture
def angles_in_fp64(monkeypatch: pytest.MonkeyPatch) -> None:
    """In fp32 they are off by up to 6e-5 at timestep 1000, and a gradient by as much."""
    from diffsynth.models.wan_video_dit import sinusoidal_embedding_1d

    def embedding(timesteps: Tensor, width: int, **_named: object) -> Tensor:
        return sinusoidal_embedding_1d(width, timesteps)

    monkeypatch.setattr("diffusers.models.embeddings.get_timestep_embedding", embedding)


def assert_alike(ours: Trained, theirs: Trained, *, weight: float = 1.0, within: float = 1e-5) -> None:
    """`weight`: theirs over ours."""
    assert weight * ours.loss == pytest.approx(theirs.loss, rel=1e-5)
    assert ours.gradients.keys() == theirs.gradients.keys() and len(theirs.gradients) > 20
    for key, gradient in theirs.gradients.items():
        scale = gradient.abs().max()
        assert scale > 0, f"{key} has no gradient, which shows nothing"
        assert (weight * ours.gradients[key] - gradient).abs().max() <= within * scale, key


@pytest.mark.parametrize("index", [100, 700])
@pytest.mark.parametrize("name", [name for name, kind in KINDS.items() if kind.family == "wan"])
@pytest.mark.usefixtures("angles_in_fp64")
def test_a_wan_model_has_the_loss_and_gradients_of_diffsynths_training(
    tmp_path: Path, name: str, index: int
) -> None:
    case = make_case(name, tmp_path, index)
    theirs = trained_by_diffsynth(case)
    assert_alike(trained_by_tworeel(case), theirs)


@pytest.mark.parametrize("index", [100, 700])
@pytest.mark.parametrize("name", [name for name, kind in KINDS.items() if kind.family == "flux2"])
def test_flux2_has_the_loss_and_gradients_of_diffsynths_training(
    tmp_path: Path, name: str, index: int
) -> None:
    case = make_case(name, tmp_path, index)
    theirs = trained_by_diffsynth(case)
    assert_alike(trained_by_tworeel(case), theirs)


def test_with_diffusers_fp32_angles_wans_loss_is_the_same_and_its_gradients_nearly(tmp_path: Path) -> None:
    case = make_case("t2v", tmp_path, 100)
    theirs = trained_by_diffsynth(case)
    assert_alike(trained_by_tworeel(case), theirs, within=2e-4)


@pytest.mark.parametrize("name", ["ti2v_5b", "flux2_klein"])
@pytest.mark.usefixtures("angles_in_fp64")
def test_by_default_the_loss_lacks_diffsynths_weight_of_the_timestep(tmp_path: Path, name: str) -> None:
    case = make_case(name, tmp_path, 700)
    theirs = trained_by_diffsynth(case)
    ours = trained_by_tworeel(case, sampling="uniform")
    weight = float(schedule(case).training_weight(schedule(case).timesteps[case.index]))
    assert abs(weight - 1) > 0.1
    assert_alike(ours, theirs, weight=weight)


def test_in_bf16_diffsynth_rounds_the_timestep_and_takes_the_nearest_noise_level(
    tmp_path: Path,
) -> None:
    from diffsynth.diffusion import FlowMatchSFTLoss

    seen: dict[str, Any] = {}

    def model(**given: Any) -> Tensor:
        seen.update(given)
        return torch.zeros(given["latents"].shape)

    levels = schedule(make_case("t2v", tmp_path, 100))
    pipe = SimpleNamespace(scheduler=levels, torch_dtype=torch.bfloat16, device="cpu", model_fn=model)
    pipe.in_iteration_models = ()
    noise = torch.randn(1, 16, 2, 4, 4)
    bounds = {"min_timestep_boundary": 0.1005, "max_timestep_boundary": 0.1015}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "randn_like", lambda _: noise)
        FlowMatchSFTLoss(pipe, input_latents=torch.zeros_like(noise), **bounds)
    exact = levels.timesteps[100]
    assert seen["timestep"] == exact.to(torch.bfloat16) != exact
    nearest = (levels.timesteps - seen["timestep"]).abs().argmin()
    assert nearest != 100
    assert torch.equal(seen["latents"], levels.sigmas[nearest] * noise)
