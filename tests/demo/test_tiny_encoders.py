"""The tiny encoders look like real checkpoints."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import torch
from diffusers.models.autoencoders.autoencoder_kl_wan import AutoencoderKLWan
from transformers import AutoTokenizer

from tworeel.demo.tiny_encoders import (
    IMAGE_TOKENS,
    IMAGE_WIDTH,
    VOCABULARY,
    write_image_encoder,
    write_text_encoder,
    write_tokenizer,
    write_vae,
)
from tworeel.models.family import Component, Layout
from tworeel.models.wan.vae import open_vae


@pytest.mark.parametrize(
    ("layout", "names"),
    [
        (
            "native",
            {
                "Wan2.1_VAE.pth",
                "Wan2.2_VAE.pth",
                "google/umt5-xxl/spiece.model",
                "google/umt5-xxl/tokenizer.json",
                "google/umt5-xxl/tokenizer_config.json",
                "models_clip_open-clip-xlm-roberta-large-vit-huge-14.pth",
                "models_t5_umt5-xxl-enc-bf16.pth",
            },
        ),
        (
            "comfyui",
            {
                "clip_vision_h.safetensors",
                "umt5_xxl_fp16.safetensors",
                "wan2.2_vae.safetensors",
                "wan_2.1_vae.safetensors",
            },
        ),
        (
            "diffusers",
            {
                "image_encoder/config.json",
                "image_encoder/model.safetensors",
                "text_encoder/config.json",
                "text_encoder/model.safetensors",
                "tokenizer/spiece.model",
                "tokenizer/tokenizer.json",
                "tokenizer/tokenizer_config.json",
                "vae/config.json",
                "vae/diffusion_pytorch_model.safetensors",
            },
        ),
    ],
)
def test_files_have_the_published_names(tmp_path: Path, layout: Layout, names: set[str]) -> None:
    for z in (16, 48):
        write_vae(tmp_path, layout, z=z)
    write_text_encoder(tmp_path, layout)
    write_tokenizer(tmp_path, layout)
    write_image_encoder(tmp_path, layout)
    assert {file.relative_to(tmp_path).as_posix() for file in tmp_path.rglob("*") if file.is_file()} == names


def test_only_the_seed_decides_and_the_callers_random_state_stays(tmp_path: Path) -> None:
    state = torch.random.get_rng_state()
    first, again, other = (
        torch.load(write_vae(tmp_path / name, "native", seed=seed), weights_only=True)
        for name, seed in (("a", 3), ("b", 3), ("c", 4))
    )
    assert torch.equal(torch.random.get_rng_state(), state)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["conv1.weight"], other["conv1.weight"])


@pytest.mark.parametrize("z", [16, 48])
def test_the_vae_decodes_what_it_encodes_to_the_same_size(tmp_path: Path, z: int) -> None:
    vae = AutoencoderKLWan.from_pretrained(write_vae(tmp_path, "diffusers", z=z))
    video = torch.zeros(1, 3, 5, 32, 32)
    with torch.no_grad():
        assert vae.decode(vae.encode(video).latent_dist.mode()).sample.shape == video.shape


def test_encoding_is_quick(tmp_path: Path) -> None:
    component = Component(files=(write_vae(tmp_path, "native"),), layout="native")
    vae = open_vae(component, torch.device("cpu"), torch.float32)
    clip = torch.zeros(3, 17, 64, 96, dtype=torch.uint8)
    vae.encode_clip(clip)
    start = time.process_time()
    vae.encode_clip(clip)
    assert time.process_time() - start < 2  # seconds of all cores; far above what it takes


def test_the_embedding_has_a_row_for_every_token(tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(write_tokenizer(tmp_path, "diffusers"))
    assert len(tokenizer) <= VOCABULARY
    assert (IMAGE_TOKENS, IMAGE_WIDTH) == ((224 // 32) ** 2 + 1, 80)
