"""Pixels are those of diffusers' pipelines, from each layout, with the decoding weights alone."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from diffusers import Flux2Pipeline
from safetensors.torch import load_file, save_file

from tworeel.demo.tiny_flux2 import tiny_vae, write_vae
from tworeel.models.family import Component, Picture
from tworeel.models.flux2.vae import load_vae
from tworeel.models.flux2.vae_decoder import Flux2Decoder
from tworeel.models.network_files import read_json, weight_files

CPU = torch.device("cpu")
PICTURE = Picture(text={}, width=48, height=64, frames=1, steps=1, guidance=1.0)
CHANNELS, HEIGHT, WIDTH = 16, 4, 3


def decoder_at(path: Path) -> Flux2Decoder:
    config = read_json(path / "config.json") if path.is_dir() else {}
    files = weight_files(path) if path.is_dir() else (path,)
    component = Component(files=files, layout="diffusers", config=config)
    return Flux2Decoder(load_vae(component, "decoder", CPU, torch.float32), CPU, torch.float32)


def tokens() -> torch.Tensor:
    return torch.randn(1, HEIGHT * WIDTH, CHANNELS, generator=torch.Generator().manual_seed(0))


def raw_latents() -> torch.Tensor:
    """What klein's pipeline makes of the tokens before it decodes them."""
    vae = tiny_vae()
    ids = torch.cartesian_prod(*map(torch.arange, (1, HEIGHT, WIDTH, 1)))[None]
    patches = Flux2Pipeline._unpack_latents_with_ids(tokens(), ids)
    std = torch.sqrt(vae.bn.running_var.view(1, -1, 1, 1) + vae.config.batch_norm_eps)
    return Flux2Pipeline._unpatchify_latents(patches * std + vae.bn.running_mean.view(1, -1, 1, 1))


@pytest.mark.parametrize("layout", ["diffusers", "native", "comfyui"])
@pytest.mark.parametrize("latents", [tokens, raw_latents])
def test_an_image_is_decoded_as_the_pipelines_decode_it(tmp_path, layout, latents):
    found = decoder_at(write_vae(tmp_path, layout)).decode(latents(), PICTURE)

    theirs = tiny_vae().decode(raw_latents(), return_dict=False)[0].permute(0, 2, 3, 1)
    assert found.dtype == torch.uint8 and found.shape == (1, 64, 48, 3)
    assert ((theirs.clamp(-1, 1) + 1) * 127.5 - found).abs().max() < 0.51


def test_the_encoder_is_not_read(tmp_path):
    whole = load_file(write_vae(tmp_path, "native"))
    # Shapes of the encoder tell what network it is; its numbers are not needed.
    emptied = {key: t if not key.startswith("encoder.") else t.fill_(torch.nan) for key, t in whole.items()}
    save_file(emptied, tmp_path / "half.safetensors")

    found = decoder_at(tmp_path / "half.safetensors").decode(tokens(), PICTURE)
    assert torch.equal(found, decoder_at(write_vae(tmp_path / "whole", "native")).decode(tokens(), PICTURE))
