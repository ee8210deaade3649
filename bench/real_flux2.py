"""FLUX.2-dev with its encoders at any size up to the real one: true keys, shapes and files, random values.

In diffusers' layout, all weights bf16 but for the VAE's:

    model_index.json
    transformer/    sharded safetensors with an index and config.json (64.4 GB)
    text_encoder/   Mistral-3's language model up to layer 30, the last one that is read (34.7 GB)
    vae/            fp32
    tokenizer/      one of a few hundred pieces; its ids fit any larger vocabulary
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKLFlux2
from PIL import Image
from real_size import SHARD_NAMES, Noise, write_json, write_shards

from tworeel.benchmarks.widths import FLUX2_DEV
from tworeel.demo.tiny_flux2 import LATENT_CHANNELS, tiny_vae, write_model_index
from tworeel.demo.tiny_flux2_encoders import VOCABULARY, write_flux2_tokenizer
from tworeel.models.family import Component
from tworeel.models.flux2.text_networks import MISTRAL
from tworeel.models.flux2.transformer import build_transformer

VARIANT = "flux2-dev"
TEXT_SHARD_NAMES = "model{suffix}.safetensors"


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """Widths and depths; the defaults are those of the real networks."""

    doubles: int = FLUX2_DEV.doubles
    singles: int = FLUX2_DEV.blocks - FLUX2_DEV.doubles
    heads: int = FLUX2_DEV.heads
    head_dim: int = 128
    channels: int = FLUX2_DEV.channels
    text_dim: int = 5120
    text_ffn_dim: int = 32768
    text_layers: int = 40
    """As the configuration says; only those that are read are written."""
    text_heads: int = 32
    text_kv_heads: int = 8
    vocabulary: int = 131072
    tiny_vae: bool = False


TINY = Sizes(
    doubles=2,
    singles=3,
    heads=2,
    head_dim=16,
    channels=4 * LATENT_CHANNELS,
    text_dim=32,
    text_ffn_dim=64,
    text_layers=32,
    text_heads=2,
    text_kv_heads=1,
    vocabulary=VOCABULARY,
    tiny_vae=True,
)
_TEXT_HEAD_DIM = 128


def write_model(folder: Path, sizes: Sizes) -> Path:
    """Write all networks; all but the VAE is streamed."""
    write_transformer(folder / "transformer", sizes)
    write_text_encoder(folder / "text_encoder", sizes)
    write_vae(folder / "vae", sizes)
    write_flux2_tokenizer(folder, "mistral3")
    write_model_index(folder, VARIANT)
    return folder


def transformer_config(sizes: Sizes) -> dict[str, Any]:
    """The arguments of diffusers' class."""
    return {
        "in_channels": sizes.channels,
        "num_layers": sizes.doubles,
        "num_single_layers": sizes.singles,
        "attention_head_dim": sizes.head_dim,
        "num_attention_heads": sizes.heads,
        "joint_attention_dim": len(MISTRAL.hidden_states) * sizes.text_dim,
        "axes_dims_rope": [sizes.head_dim // 4] * 4,
        "guidance_embeds": True,
    }


def write_transformer(folder: Path, sizes: Sizes) -> Path:
    """Write the shards one after the other, their index and config.json."""
    config = transformer_config(sizes)
    model = build_transformer(Component(files=(), layout="diffusers", config=config))
    shapes = {name: tuple(parameter.shape) for name, parameter in model.state_dict().items()}
    write_shards(folder, shapes, SHARD_NAMES, Noise())
    write_json(folder / "config.json", {"_class_name": "Flux2Transformer2DModel", **config})
    return folder


def write_text_encoder(folder: Path, sizes: Sizes) -> Path:
    """Write the language model in shards, its index and config.json."""
    write_shards(folder, dict(_text_shapes(sizes)), TEXT_SHARD_NAMES, Noise(seed=1))
    text = {
        "model_type": "mistral",
        "hidden_size": sizes.text_dim,
        "intermediate_size": sizes.text_ffn_dim,
        "num_hidden_layers": sizes.text_layers,
        "num_attention_heads": sizes.text_heads,
        "num_key_value_heads": sizes.text_kv_heads,
        "vocab_size": sizes.vocabulary,
        **MISTRAL.defaults,
    }
    config = {"architectures": ["Mistral3ForConditionalGeneration"], "model_type": "mistral3"}
    write_json(folder / "config.json", {**config, "text_config": text})
    return folder


def write_vae(folder: Path, sizes: Sizes) -> Path:
    """Write the VAE, decoder included, with the class's own start as values."""
    torch.manual_seed(0)
    vae: Any = tiny_vae() if sizes.tiny_vae else AutoencoderKLFlux2()
    vae.save_pretrained(folder)
    return folder


def write_images(folder: Path, *, width: int, height: int, count: int) -> list[Path]:
    """Write images, a bright bar over noise, with captions."""
    folder.mkdir(parents=True, exist_ok=True)
    return [_write_image(folder / f"image_{k}.png", width, height, k) for k in range(count)]


def captions(count: int) -> list[str]:
    """Captions of a hundred words or so, all different."""
    words = ("a", "bright", "bar", "over", "noise", "beside", "warm", "stone", "and", "quiet", "water")
    return [" ".join(random.Random(k).choices(words, k=100)) + f" {k}" for k in range(count)]


def _write_image(path: Path, width: int, height: int, seed: int) -> Path:
    drawn = np.random.default_rng(seed).integers(0, 160, (height, width, 3), dtype=np.uint8)
    left = seed * (width // 8) % (width - width // 8)
    drawn[:, left : left + width // 8] = 235
    Image.fromarray(drawn).save(path)
    path.with_suffix(".txt").write_text(captions(seed + 1)[seed] + "\n", encoding="utf-8")
    return path


def _text_shapes(sizes: Sizes) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Keys and shapes of the language model's part of Mistral-3's files, as far as it is read."""
    width, hidden = sizes.text_dim, sizes.text_ffn_dim
    queries, keys = (heads * _TEXT_HEAD_DIM for heads in (sizes.text_heads, sizes.text_kv_heads))
    attention = {"q": (queries, width), "k": (keys, width), "v": (keys, width), "o": (width, queries)}
    feed_forward = {"gate": (hidden, width), "up": (hidden, width), "down": (width, hidden)}
    yield "language_model.model.embed_tokens.weight", (sizes.vocabulary, width)
    for k in range(MISTRAL.num_layers):
        layer = f"language_model.model.layers.{k}"
        yield f"{layer}.input_layernorm.weight", (width,)
        for name, shape in attention.items():
            yield f"{layer}.self_attn.{name}_proj.weight", shape
        yield f"{layer}.post_attention_layernorm.weight", (width,)
        for name, shape in feed_forward.items():
            yield f"{layer}.mlp.{name}_proj.weight", shape
