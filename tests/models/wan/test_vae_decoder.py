"""The VAE's decoder against diffusers' own, in every layout."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from diffusers.models.autoencoders.autoencoder_kl_wan import AutoencoderKLWan
from safetensors.torch import load_file, save_file

from tworeel.models.family import Component, Layout, Picture
from tworeel.models.wan.vae import load_vae
from tworeel.models.wan.vae_decoder import WanDecoder

CPU = torch.device("cpu")
OpenComponent = Callable[..., Component]
PICTURE = Picture(text={}, width=48, height=32, frames=9, steps=1, guidance=1.0)


def decoder_of(component: Component) -> WanDecoder:
    return WanDecoder(load_vae(component, "decoder", CPU, torch.float32), CPU, torch.float32)


def random_latents(z: int, frames: int) -> torch.Tensor:
    return torch.randn(1, z, frames, 4, 6, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("z", [16, 48])
@pytest.mark.parametrize("frames", [1, 3])
def test_pixels_are_those_of_diffusers(tiny_vae: OpenComponent, layout: Layout, z: int, frames: int) -> None:
    latents = random_latents(z, frames)
    ours = decoder_of(tiny_vae(layout, z=z)).decode(latents, PICTURE)
    vae = AutoencoderKLWan.from_pretrained(tiny_vae("diffusers", z=z).files[0].parent)
    mean, std = (torch.tensor(vae.config[f"latents_{name}"]).view(1, -1, 1, 1, 1) for name in ("mean", "std"))
    with torch.no_grad():
        theirs = vae.decode(latents * std + mean).sample[0].permute(1, 2, 3, 0)
    assert ours.dtype == torch.uint8 and ours.shape == theirs.shape and len(ours) == 4 * frames - 3
    assert ((theirs + 1) * 127.5 - ours).abs().max() < 0.51


def test_the_encoder_is_neither_needed_nor_read(tiny_vae: OpenComponent, tmp_path) -> None:
    whole = load_file(tiny_vae("comfyui").files[0])
    # The first convolution of the encoder tells whose names these are, and the width.
    named = ("decoder.", "conv2.", "encoder.conv1.weight", "conv1.weight")
    half = {key: tensor for key, tensor in whole.items() if key.startswith(named)}
    assert len(half) < len(whole)
    save_file(half, tmp_path / "vae.safetensors")
    found = decoder_of(Component(files=(tmp_path / "vae.safetensors",), layout="comfyui"))
    latents = random_latents(16, 2)
    expected = decoder_of(tiny_vae("native")).decode(latents, PICTURE)
    assert torch.equal(found.decode(latents, PICTURE), expected)
