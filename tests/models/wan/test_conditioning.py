"""What the transformer is shown in training, against what diffusers' pipelines show it when they sample."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKLWan, FlowMatchEulerDiscreteScheduler, WanTransformer3DModel
from diffusers.pipelines.wan.pipeline_wan import WanPipeline
from diffusers.pipelines.wan.pipeline_wan_i2v import WanImageToVideoPipeline
from PIL import Image
from torch import Tensor
from transformers import AutoTokenizer, CLIPImageProcessor, CLIPVisionModel, UMT5EncoderModel

from tworeel.demo.checkpoint import write_checkpoint
from tworeel.models.family import ModelRequest, ModelSource
from tworeel.models.wan.conditioning import make_sample
from tworeel.models.wan.family import WAN
from tworeel.models.wan.variants import traits

CPU = torch.device("cpu")
CAPTION = "a red ball rolls over a green hill"
FRAMES = 9
IMAGE_VARIANTS = ("wan2.1-i2v-14b", "wan2.1-flf2v-14b", "wan2.2-i2v-a14b", "wan2.2-ti2v-5b")
TEXT_VARIANTS = ("wan2.1-t2v-1.3b", "wan2.2-t2v-a14b", "wan2.2-ti2v-5b")


@dataclass(frozen=True)
class Side:
    """A tiny checkpoint as we and as diffusers see it."""

    source: ModelSource
    folder: Path

    def pipeline(self, kind: type[Any]) -> Any:
        parts: dict[str, Any] = {
            "tokenizer": AutoTokenizer.from_pretrained(self.folder / "tokenizer"),
            "text_encoder": UMT5EncoderModel.from_pretrained(self.folder / "text_encoder"),
            "vae": AutoencoderKLWan.from_pretrained(self.folder / "vae"),
            "scheduler": FlowMatchEulerDiscreteScheduler(shift=5.0),
            "transformer": WanTransformer3DModel.from_pretrained(self.folder / "transformer").float(),
            "expand_timesteps": self.source.traits.image_optional,
        }
        if (self.folder / "image_encoder").is_dir():
            parts["image_encoder"] = CLIPVisionModel.from_pretrained(self.folder / "image_encoder")
            parts["image_processor"] = CLIPImageProcessor()
        pipeline = kind(**parts)
        pipeline.set_progress_bar_config(disable=True)
        return pipeline

    def cached(self, clip: Tensor) -> dict[str, Tensor]:
        latents = WAN.open_latent_encoder(self.source, CPU, torch.float32).encode(clip, {})
        return latents | WAN.open_text_encoder(self.source, CPU, torch.float32).encode(CAPTION)


def make_side(folder: Path, variant: str) -> Side:
    write_checkpoint(folder, variant=variant, layout="diffusers", num_layers=1, dim=128, ffn_dim=64)
    expert = "high" if "a14b" in variant else None
    source = WAN.locate(ModelRequest(path=str(folder), expert=expert))
    assert source is not None
    return Side(source, folder)


def random_clip(size: int) -> Tensor:
    generator = torch.Generator().manual_seed(5)
    return torch.randint(256, (3, FRAMES, size, size), generator=generator, dtype=torch.uint8)


def picture(frame: Tensor) -> Image.Image:
    return Image.fromarray(np.ascontiguousarray(frame.permute(1, 2, 0).numpy()))


def shown(pipeline: Any, **call: Any) -> dict[str, Any]:
    """What the pipeline gives its transformer in the second of two steps."""
    seen: list[dict[str, Any]] = []
    hook = pipeline.transformer.register_forward_pre_hook(
        lambda _, args, kwargs: seen.append(kwargs), with_kwargs=True
    )
    pipeline(
        prompt=CAPTION,
        num_frames=FRAMES,
        num_inference_steps=2,
        guidance_scale=1.0,
        output_type="latent",
        generator=torch.Generator().manual_seed(1),
        **call,
    )
    hook.remove()
    return seen[-1]


def sample_like(side: Side, cached: Mapping[str, Tensor], theirs: Mapping[str, Any], **options: bool) -> Any:
    """Our sample at the pipeline's noise level, with the noise that makes x_t the pipeline's."""
    sigma = float(theirs["timestep"].max()) / 1000
    latents = cached["latents"]
    noisy = theirs["hidden_states"][0, : latents.shape[0]]
    noise = (noisy - (1 - sigma) * latents) / sigma
    return make_sample(side.source.traits, cached, noise, sigma, dtype=torch.float32, **options)


def assert_same_inputs(pipeline: Any, ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> None:
    wanted = {
        name: value for name, value in theirs.items() if isinstance(value, Tensor) and name != "timestep"
    }
    assert {name for name in ours if name != "timestep"} == set(wanted)
    for name, value in wanted.items():
        torch.testing.assert_close(ours[name], value, rtol=1e-4, atol=1e-4)
    per_token = torch.broadcast_to(ours["timestep"], theirs["timestep"].shape)
    torch.testing.assert_close(per_token, theirs["timestep"], rtol=1e-6, atol=0)
    with torch.no_grad():
        outputs = [
            pipeline.transformer(**inputs, return_dict=False)[0]
            for inputs in (ours, {**wanted, "timestep": theirs["timestep"]})
        ]
    torch.testing.assert_close(outputs[0], outputs[1], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("variant", IMAGE_VARIANTS)
def test_an_image_conditions_the_transformer_as_in_diffusers(tmp_path: Path, variant: str) -> None:
    side = make_side(tmp_path, variant)
    # CLIP's own size where there is a CLIP: diffusers' processor cuts a square out, Wan's authors squeeze.
    size = 224 if side.source.image_encoder else 64
    clip = random_clip(size)
    pipeline = side.pipeline(WanImageToVideoPipeline)
    images = {"image": picture(clip[:, 0])}
    if "last_image" in side.source.traits.image_inputs:
        images["last_image"] = picture(clip[:, -1])
    theirs = shown(pipeline, height=size, width=size, **images)
    sample = sample_like(side, side.cached(clip), theirs)
    assert_same_inputs(pipeline, sample.inputs, theirs)


@pytest.mark.parametrize("variant", TEXT_VARIANTS)
def test_a_caption_alone_conditions_the_transformer_as_in_diffusers(tmp_path: Path, variant: str) -> None:
    side = make_side(tmp_path, variant)
    pipeline = side.pipeline(WanPipeline)
    theirs = shown(pipeline, height=64, width=64, max_sequence_length=512)
    sample = sample_like(side, side.cached(random_clip(64)), theirs, condition_on_image=False)
    assert sample.loss_mask is None
    assert_same_inputs(pipeline, sample.inputs, theirs)


@pytest.mark.parametrize("variant", ["wan2.2-i2v-a14b", "wan2.1-flf2v-14b"])
def test_mask_and_image_latents_are_those_of_prepare_latents(tmp_path: Path, variant: str) -> None:
    side = make_side(tmp_path, variant)
    clip, two = random_clip(64), variant == "wan2.1-flf2v-14b"
    pixels = clip.float() / 127.5 - 1
    with torch.no_grad():
        _, condition = side.pipeline(WanImageToVideoPipeline).prepare_latents(
            pixels[None, :, 0],
            1,
            height=64,
            width=64,
            num_frames=FRAMES,
            dtype=torch.float32,
            device=CPU,
            last_image=pixels[None, :, -1] if two else None,
        )
    cached = side.cached(clip)
    sample = make_sample(
        side.source.traits, cached, torch.zeros_like(cached["latents"]), 0.5, dtype=torch.float32
    )
    ours = sample.inputs["hidden_states"][:, 16:]
    assert torch.equal(ours[:, :4], condition[:, :4])
    assert ours[:, :4].sum() == (4 + two) * 64
    torch.testing.assert_close(ours[:, 4:], condition[:, 4:], rtol=1e-4, atol=1e-4)


def test_ti2v_keeps_the_first_frame_clean_at_timestep_0_and_out_of_the_loss(tmp_path: Path) -> None:
    side = make_side(tmp_path, "wan2.2-ti2v-5b")
    cached = side.cached(random_clip(64))
    latents = cached["latents"]
    noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(2))
    sample = make_sample(side.source.traits, cached, noise, 0.75, dtype=torch.float32)
    shape = (1, 1, *latents.shape[1:])
    mask = side.pipeline(WanImageToVideoPipeline).prepare_latents(
        torch.zeros(1, 3, 64, 64), 1, 48, 64, 64, FRAMES, torch.float32, CPU
    )[2]
    assert mask.shape == shape
    assert torch.equal(sample.inputs["timestep"], (mask[0][0][:, ::2, ::2] * 750.0).flatten()[None])
    assert torch.equal(sample.inputs["hidden_states"][0, :, 0], latents[:, 0])
    assert not torch.equal(sample.inputs["hidden_states"][0, :, 1], latents[:, 1])
    assert sample.loss_mask is not None
    assert torch.equal(sample.loss_mask.expand(shape), mask)


def test_a_first_image_of_its_own_takes_the_place_of_the_clips_first_frame() -> None:
    latents, first = torch.ones(48, 3, 4, 4), torch.full((48, 1, 4, 4), 7.0)
    cached = {"latents": latents, "text": torch.ones(2, 8), "first_latent": first}
    sample = make_sample(
        traits("wan2.2-ti2v-5b", None), cached, torch.zeros_like(latents), 0.5, dtype=torch.float32
    )
    assert torch.equal(sample.inputs["hidden_states"][0, :, :1], first)
    assert torch.equal(sample.inputs["hidden_states"][0, :, 1:], latents[:, 1:] * 0.5)


@pytest.mark.parametrize(("frames", "condition"), [(1, True), (3, False)])
def test_ti2v_trains_a_still_or_on_demand_as_text_to_video(frames: int, condition: bool) -> None:
    latents = torch.ones(48, frames, 4, 4)
    sample = make_sample(
        traits("wan2.2-ti2v-5b", None),
        {"latents": latents, "text": torch.ones(2, 8)},
        torch.zeros_like(latents),
        0.5,
        dtype=torch.float32,
        condition_on_image=condition,
    )
    assert sample.loss_mask is None
    assert torch.equal(sample.inputs["timestep"], torch.tensor([500.0]))
    assert torch.equal(sample.inputs["hidden_states"], latents[None] * 0.5)


@pytest.mark.parametrize("sigma", [0.004995, 0.3, 0.5, 0.875, 1.0])
def test_x_t_is_on_the_straight_line_and_the_target_is_its_slope(sigma: float) -> None:
    generator = torch.Generator().manual_seed(3)
    latents, noise = (torch.randn(16, 2, 4, 6, generator=generator) for _ in range(2))
    cached = {"latents": latents, "text": torch.ones(3, 8)}
    sample = make_sample(traits("wan2.1-t2v-1.3b", None), cached, noise, sigma, dtype=torch.bfloat16)
    exact = (1 - sigma) * latents.double() + sigma * noise.double()
    assert sample.inputs["hidden_states"].dtype == torch.bfloat16
    torch.testing.assert_close(sample.inputs["hidden_states"][0].double(), exact, rtol=2**-8, atol=1e-6)
    assert sample.target.dtype == torch.float32
    assert torch.equal(sample.target[0], noise - latents)
    assert sample.inputs["timestep"].dtype == torch.float32
    assert sample.inputs["timestep"].item() == pytest.approx(1000 * sigma, rel=1e-7)


def test_text_is_padded_with_zeros_to_512_tokens() -> None:
    latents = torch.zeros(16, 1, 2, 2)
    for length in (0, 3, 512):
        text = torch.ones(length, 8)
        cached = {"latents": latents, "text": text}
        sample = make_sample(traits("wan2.1-t2v-1.3b", None), cached, latents, 0.5, dtype=torch.float32)
        padded = sample.inputs["encoder_hidden_states"]
        assert padded.shape == (1, 512, 8)
        assert torch.equal(padded[0, :length], text)
        assert not padded[0, length:].any()
