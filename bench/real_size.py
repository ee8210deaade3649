"""A Wan 2.2 T2V-A14B expert with its encoders at any size up to the real one: true keys, shapes and files.

Values are random, so that all of it runs as the real one does, only to no end. Layout and names are those of
Wan's authors:

    high_noise_model/          sharded safetensors with an index and config.json, bf16
    models_t5_umt5-xxl-enc-bf16.pth
    Wan2.1_VAE.pth             fp32
    google/umt5-xxl/           a tokenizer of a few hundred pieces; its ids fit any larger vocabulary
"""

from __future__ import annotations

import json
import math
import random
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import av
import numpy as np
import torch
from av.video.frame import VideoFrame
from diffusers.models.autoencoders.autoencoder_kl_wan import AutoencoderKLWan
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors.torch import save_file
from torch import Tensor

from tworeel.demo.tiny_encoders import NATIVE_TEXT, NATIVE_VAE, VOCABULARY, write_tokenizer
from tworeel.models.family import Component
from tworeel.models.wan.keys import to_native
from tworeel.models.wan.transformer import build_transformer
from tworeel.models.wan.vae_keys import vae_modules

EXPERT = "high_noise_model"
SHARD_SIZE = "2GB"
SHARD_NAMES = "diffusion_pytorch_model{suffix}.safetensors"
SCALE = 0.02
"""Standard deviation of the weights: activations stay far from bf16's limits over 40 blocks."""
_BLOCK = 2**24
_HEAD_DIM = 128


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """Widths and depths; the defaults are those of the real networks."""

    layers: int = 40
    dim: int = 5120
    ffn_dim: int = 13824
    text_dim: int = 4096
    text_ffn_dim: int = 10240
    text_layers: int = 24
    text_heads: int = 64
    vocabulary: int = 256384
    vae_dim: int = 96


TINY = Sizes(
    layers=4,
    dim=256,
    ffn_dim=512,
    text_dim=64,
    text_ffn_dim=128,
    text_layers=2,
    text_heads=4,
    vocabulary=VOCABULARY,
    vae_dim=8,
)


class Noise:
    """Random bf16 tensors at the speed of memory: one block of values, repeated from changing places."""

    def __init__(self, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)
        self._block = (torch.randn(_BLOCK, generator=generator) * SCALE).to(torch.bfloat16)
        self._start = 0

    def tensor(self, shape: tuple[int, ...]) -> Tensor:
        """A new tensor, normal with deviation `SCALE`."""
        flat = torch.empty(math.prod(shape), dtype=torch.bfloat16)
        filled = 0
        while filled < len(flat):
            part = self._block[self._start : self._start + len(flat) - filled]
            flat[filled : filled + len(part)] = part
            filled += len(part)
            self._start = (self._start + len(part)) % _BLOCK
        return flat.view(shape)

    def weight(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """A weight; those of norms (one axis, not a bias) are ones."""
        if len(shape) == 1 and name.endswith("weight"):
            return torch.ones(shape, dtype=torch.bfloat16)
        return self.tensor(shape)


def write_model(folder: Path, sizes: Sizes) -> Path:
    """Write all networks; needs memory for the text encoder (11.4 GB at real size), the rest is streamed."""
    write_transformer(folder / EXPERT, sizes)
    write_text_encoder(folder, sizes)
    write_vae(folder, sizes)
    write_tokenizer(folder, "native")
    return folder


def transformer_config(sizes: Sizes) -> dict[str, object]:
    """The arguments of diffusers' class."""
    return {
        "num_attention_heads": sizes.dim // _HEAD_DIM,
        "attention_head_dim": _HEAD_DIM,
        "in_channels": 16,
        "out_channels": 16,
        "text_dim": sizes.text_dim,
        "freq_dim": 256,
        "ffn_dim": sizes.ffn_dim,
        "num_layers": sizes.layers,
    }


def write_transformer(folder: Path, sizes: Sizes) -> Path:
    """Write the shards one after the other, their index and the authors' config.json."""
    model = build_transformer(Component(files=(), layout="native", config=transformer_config(sizes)))
    shapes = {to_native(name): tuple(parameter.shape) for name, parameter in model.state_dict().items()}
    write_shards(folder, shapes, SHARD_NAMES, Noise())
    write_json(folder / "config.json", _native_config(sizes))
    return folder


def write_shards(folder: Path, shapes: Mapping[str, tuple[int, ...]], names: str, noise: Noise) -> None:
    """Write random bf16 weights in shards and their index; memory holds one shard at a time."""
    folder.mkdir(parents=True, exist_ok=True)
    empty = {name: torch.empty(shape, dtype=torch.bfloat16, device="meta") for name, shape in shapes.items()}
    plan = split_torch_state_dict_into_shards(empty, filename_pattern=names, max_shard_size=SHARD_SIZE)
    for file, inside in plan.filename_to_tensors.items():
        tensors = {name: noise.weight(name, shapes[name]) for name in inside}
        save_file(tensors, folder / file, metadata={"format": "pt"})
    index = {"metadata": plan.metadata, "weight_map": plan.tensor_to_filename}
    write_json(folder / f"{names.format(suffix='')}.index.json", index)


def write_text_encoder(folder: Path, sizes: Sizes) -> Path:
    """Write UMT5 as one bf16 `.pth` file."""
    noise = Noise(seed=1)
    tensors = {name: noise.weight(name, shape) for name, shape in _text_shapes(sizes)}
    torch.save(tensors, folder / NATIVE_TEXT)
    return folder / NATIVE_TEXT


def write_vae(folder: Path, sizes: Sizes) -> Path:
    """Write the VAE of Wan 2.1, decoder included, with the class's own start as values."""
    torch.manual_seed(0)
    vae = AutoencoderKLWan(base_dim=sizes.vae_dim, z_dim=16)
    native = {ours: theirs for theirs, ours in vae_modules(residual=False).items()}
    tensors = {}
    for name, tensor in vae.state_dict().items():
        module, _, leaf = name.rpartition(".")
        tensors[f"{native[module]}.{leaf}"] = tensor
    torch.save(tensors, folder / NATIVE_VAE[16])
    return folder / NATIVE_VAE[16]


def write_clips(folder: Path, *, width: int, height: int, frames: int, count: int) -> list[Path]:
    """Write H.264 clips of 16 frames a second, a bright bar that moves over noise, with captions."""
    folder.mkdir(parents=True, exist_ok=True)
    return [_write_clip(folder / f"clip_{k}.mp4", width, height, frames, k) for k in range(count)]


def _write_clip(path: Path, width: int, height: int, frames: int, seed: int) -> Path:
    drawn = np.random.default_rng(seed).integers(0, 160, (height, width, 3), dtype=np.uint8)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=16, options={"preset": "veryfast"})
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        for k in range(frames):
            picture = drawn.copy()
            left = k * (width - width // 8) // max(1, frames - 1)
            picture[:, left : left + width // 8] = 235
            container.mux(stream.encode(VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode())
    words = random.Random(seed).choice(("slowly", "quickly", "steadily"))
    path.with_suffix(".txt").write_text(f"A bright bar moves {words} over noise {seed}.\n", encoding="utf-8")
    return path


def _text_shapes(sizes: Sizes) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Keys and shapes of the authors' UMT5 file; T5's linear layers have no bias."""
    width, hidden = sizes.text_dim, sizes.text_ffn_dim
    yield "token_embedding.weight", (sizes.vocabulary, width)
    for k in range(sizes.text_layers):
        yield f"blocks.{k}.norm1.weight", (width,)
        for projection in "qkvo":
            yield f"blocks.{k}.attn.{projection}.weight", (width, width)
        yield f"blocks.{k}.norm2.weight", (width,)
        yield f"blocks.{k}.ffn.gate.0.weight", (hidden, width)
        yield f"blocks.{k}.ffn.fc1.weight", (hidden, width)
        yield f"blocks.{k}.ffn.fc2.weight", (width, hidden)
        yield f"blocks.{k}.pos_embedding.embedding.weight", (32, sizes.text_heads)
    yield "norm.weight", (width,)


def _native_config(sizes: Sizes) -> dict[str, object]:
    return {
        "_class_name": "WanModel",
        "_diffusers_version": "0.33.0",
        "dim": sizes.dim,
        "eps": 1e-6,
        "ffn_dim": sizes.ffn_dim,
        "freq_dim": 256,
        "in_dim": 16,
        "model_type": "t2v",
        "num_heads": sizes.dim // _HEAD_DIM,
        "num_layers": sizes.layers,
        "out_dim": 16,
        "text_len": 512,
    }


def write_json(path: Path, content: Mapping[str, object]) -> None:
    """Write a table as JSON."""
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
