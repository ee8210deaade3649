"""The CLIP image encoder against transformers and diffusers' pipeline, in every layout."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.pipelines.wan.pipeline_wan_i2v import WanImageToVideoPipeline
from transformers import CLIPImageProcessorPil, CLIPVisionConfig, CLIPVisionModel

from tworeel.errors import UserError
from tworeel.models.family import Component, Layout
from tworeel.models.wan.image import clip_pixels, image_config, open_image_encoder
from tworeel.models.wan.image_keys import OpenClipFiles
from tworeel.weights.tensor_files import TensorInfo

CPU = torch.device("cpu")
OpenComponent = Callable[..., Component]

# One step of 255 after division by the smallest standard deviation: PIL rounds to whole steps, twice.
TWO_STEPS = 2 / 255 / 0.26


def smooth_image(height: int, width: int) -> torch.Tensor:
    """A photo-like picture: no single pixel differs much from its neighbours."""
    generator = torch.Generator().manual_seed(0)
    noise = torch.rand(1, 3, height // 8, width // 8, generator=generator) * 255
    return torch.nn.functional.interpolate(noise, (height, width), mode="bilinear")[0].to(torch.uint8)


def processor() -> Any:
    return CLIPImageProcessorPil(size={"height": 224, "width": 224}, do_center_crop=False)


@pytest.mark.parametrize("size", [(480, 832), (832, 480), (64, 96)])
def test_pixels_are_those_of_clips_own_processor(size: tuple[int, int]) -> None:
    image = smooth_image(*size)
    theirs = processor()(images=image.permute(1, 2, 0).numpy(), return_tensors="pt").pixel_values[0]
    assert (clip_pixels(image, 224) - theirs).abs().max() <= TWO_STEPS


def test_features_are_those_of_diffusers_pipeline(tiny_image_encoder: OpenComponent, layout: Layout) -> None:
    image = smooth_image(224, 224)  # needs no resizing, so both see the same pixels
    ours = open_image_encoder(tiny_image_encoder(layout), CPU, torch.float32).encode(image)
    parts: dict[str, Any] = dict.fromkeys(("tokenizer", "text_encoder", "vae", "scheduler"))
    parts["image_encoder"] = CLIPVisionModel.from_pretrained(tiny_image_encoder("diffusers").files[0].parent)
    pipeline = WanImageToVideoPipeline(image_processor=processor(), **parts)
    with torch.no_grad():
        theirs = pipeline.encode_image(image.permute(1, 2, 0).numpy(), device=CPU)[0]
    assert ours.shape == theirs.shape == (50, 80)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_every_layout_gives_the_same_bits(tiny_image_encoder: OpenComponent) -> None:
    image = smooth_image(64, 96)
    native, diffusers, comfyui = (
        open_image_encoder(tiny_image_encoder(layout), CPU, torch.float32).encode(image)
        for layout in ("native", "diffusers", "comfyui")
    )
    assert torch.equal(native, diffusers) and torch.equal(native, comfyui)


def test_the_authors_fused_projection_is_split_in_order(tiny_image_encoder: OpenComponent) -> None:
    stored = torch.load(tiny_image_encoder("native").files[0], weights_only=True)
    files = OpenClipFiles(*tiny_image_encoder("native").files)
    fused = stored["visual.transformer.1.attn.to_qkv.weight"]
    split = [files.read(f"encoder.layers.1.self_attn.{part}_proj.weight") for part in "qkv"]
    assert torch.equal(torch.cat(split), fused)
    assert not any("textual" in name or "head" in name for name in files.names)


def test_shapes_tell_the_config_of_vit_h_14() -> None:
    published = {
        "hidden_size": 1280,
        "intermediate_size": 5120,
        "num_hidden_layers": 32,
        "num_attention_heads": 16,
        "image_size": 224,
        "patch_size": 14,
        "hidden_act": "gelu",
    }
    with torch.device("meta"):
        model = CLIPVisionModel(CLIPVisionConfig.from_dict(published))
    tensors = {f"vision_model.{name}": tensor for name, tensor in model.state_dict().items()}
    names = {name: TensorInfo(tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()}
    assert image_config(Component(files=(Path("clip"),), layout="comfyui"), names) == published


def test_another_networks_file_is_named_as_such(tiny_vae: OpenComponent) -> None:
    with pytest.raises(UserError, match="not a CLIP image encoder"):
        open_image_encoder(tiny_vae("native"), CPU, torch.float32)
