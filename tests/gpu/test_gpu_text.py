"""FLUX.2's text encoders on GPUs: whole, spread, in 8 bits and with weights from disk."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tworeel.demo.tiny_flux2_encoders import write_flux2_text_encoder, write_flux2_tokenizer
from tworeel.models.family import Component, ModelSource, TextEncoder, TextOptions, Traits
from tworeel.models.flux2.text import open_streamed
from tworeel.models.flux2.text_placement import WORKING, text_sizes, text_workers

pytestmark = pytest.mark.gpu
CAPTION = "a red ball rolls over a green hill"


@pytest.fixture
def source(tmp_path: Path) -> ModelSource:
    """A tiny Mistral-3 with its tokenizer."""
    traits = Traits(
        family="flux2",
        variant="flux2-dev",
        frame_rate=1,
        spatial_multiple=16,
        temporal_stride=1,
        tokens_per_pixel_area=256,
    )
    path = write_flux2_text_encoder(tmp_path, "comfyui", "mistral3")
    return ModelSource(
        traits=traits,
        transformer=Component(files=(), layout="diffusers"),
        text_encoder=Component(files=(path,), layout="comfyui"),
        tokenizer=write_flux2_tokenizer(tmp_path, "mistral3"),
    )


def devices() -> list[torch.device]:
    kind = torch.accelerator.current_accelerator()
    assert kind is not None
    return [torch.device(kind.type, index) for index in range(torch.accelerator.device_count())]


@pytest.mark.parametrize("way", ["each", "spread", "fp8", "streamed"])
def test_captions_embedded_on_gpus_are_those_of_the_cpu(source: ModelSource, way: str) -> None:
    gpus, cpu = devices(), torch.device("cpu")
    encoder: TextEncoder
    if way == "spread" and len(gpus) < 2:
        pytest.skip("needs two accelerators")
    total = int(text_sizes(source, torch.float32).total(None))
    options = {
        "each": TextOptions(placement="each", quantize=None),
        "spread": TextOptions(placement="spread", quantize=None),
        "fp8": TextOptions(quantize="fp8"),
    }.get(way, TextOptions())
    # Two thirds of the network fit on each.
    free = WORKING + total * 2 // 3 if way == "spread" else 10**12
    if way == "streamed":
        encoder = open_streamed(source, gpus[0], torch.float32)
    else:
        encoder = text_workers(source, gpus, torch.float32, options, free=lambda device: free)[0].open()
    reference = text_workers(source, [cpu], torch.float32, TextOptions())[0].open().encode(CAPTION)["text"]
    text = encoder.encode(CAPTION)["text"]
    assert text.device == cpu and text.dtype == torch.float32
    tolerance = 0.5 if way == "fp8" else 1e-2
    first = slice(0, 32)  # random layers enlarge what kernels and 8 bits round
    assert (text - reference)[:, first].norm() / reference[:, first].norm() < tolerance
