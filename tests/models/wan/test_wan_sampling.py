"""Which pipeline a variant has, and what it is called with."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from diffusers import WanImageToVideoPipeline, WanPipeline
from torch import nn

from tworeel.demo.checkpoint import write_checkpoint
from tworeel.models.family import ModelRequest, ModelSource, Picture
from tworeel.models.wan.family import WAN
from tworeel.models.wan.layouts import locate

SAMPLING = WAN.sampling
assert SAMPLING is not None
CASES = {
    "wan2.1-t2v-1.3b": (WanPipeline, None, False),
    "wan2.1-i2v-14b": (WanImageToVideoPipeline, None, False),
    "wan2.1-flf2v-14b": (WanImageToVideoPipeline, None, False),
    "wan2.2-t2v-a14b": (WanPipeline, 0.875, False),
    "wan2.2-i2v-a14b": (WanImageToVideoPipeline, 0.9, False),
    "wan2.2-ti2v-5b": (WanPipeline, None, True),
}


def source_of(folder: Path, variant: str) -> ModelSource:
    write_checkpoint(folder, variant=variant, layout="native", num_layers=1, dim=128, ffn_dim=128)
    found = locate(ModelRequest(path=str(folder), expert="high" if "a14b" in variant else None))
    assert found is not None
    return found


def picture_of(source: ModelSource) -> Picture:
    """What the encoders would return for the images that the variant must have."""
    images = {}
    if source.traits.image_inputs and not source.traits.image_optional:
        images["image_latents"] = torch.zeros(16, 2, 4, 4)
        if source.image_encoder is not None:
            images["image_embeds"] = torch.zeros(50 * len(source.traits.image_inputs), 80)
    text = {"text": torch.ones(3, 64)}
    return Picture(text=text, images=images, width=32, height=32, frames=5, steps=4, guidance=1.0)


class Part(nn.Module):
    """Stands for a transformer; no device is touched."""

    def __init__(self, source: ModelSource, device: str = "cpu") -> None:
        super().__init__()
        self.config = WAN.build_transformer(source.transformer).config
        self.device, self.dtype = torch.device(device), torch.float32


@pytest.mark.parametrize("variant", CASES)
def test_each_variant_has_its_pipeline(tmp_path: Path, variant: str) -> None:
    kind, boundary, expands = CASES[variant]
    source = source_of(tmp_path, variant)
    experts = SAMPLING.experts(source.traits)
    assert experts == (("high", "low") if boundary else ())
    picture = picture_of(source)
    pipeline = SAMPLING.make_pipeline(source, [Part(source) for _ in experts or (0,)], picture)
    assert isinstance(pipeline, kind)
    assert (pipeline.config.boundary_ratio, pipeline.config.expand_timesteps) == (boundary, expands)
    assert pipeline.scheduler.config.flow_shift == source.traits.shift
    assert not any(
        list(part.parameters()) for part in pipeline.components.values() if hasattr(part, "parameters")
    )


@pytest.mark.parametrize("device", ["cpu", "cuda:1"])
def test_the_pipeline_computes_where_its_transformer_is(tmp_path: Path, device: str) -> None:
    source = source_of(tmp_path, "wan2.2-t2v-a14b")
    pipeline = SAMPLING.make_pipeline(source, [Part(source, device)] * 2, picture_of(source))
    assert pipeline.device == pipeline._execution_device == torch.device(device)


def test_text_is_padded_and_a_negative_prompt_is_optional(tmp_path: Path) -> None:
    source = source_of(tmp_path, "wan2.1-t2v-1.3b")
    called = SAMPLING.arguments(source, picture_of(source))
    assert called["prompt_embeds"].shape == (1, 512, 64) and called["prompt_embeds"].sum() == 3 * 64
    assert called["negative_prompt_embeds"] is None and "image" not in called


def test_both_images_of_flf2v_are_handed_over(tmp_path: Path) -> None:
    source = source_of(tmp_path, "wan2.1-flf2v-14b")
    picture = picture_of(source)
    assert {"image", "last_image"} <= set(SAMPLING.arguments(source, picture))
    pipeline = SAMPLING.make_pipeline(source, [Part(source)], picture)
    assert pipeline.encode_image(None, torch.device("cpu")).shape == (2, 50, 80)
