"""The networks that DiffSynth's scripts load in the comparison: sizes, random weights, registration."""

from __future__ import annotations

import importlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from real_size import Noise
from safetensors.torch import save_file


@dataclass(frozen=True, kw_only=True)
class Network:
    """One network, and how DiffSynth knows it."""

    role: str
    """Names its file."""
    model_name: str
    model_class: str
    options: dict[str, Any] = field(default_factory=dict)
    base: str = ""
    """The class that `model_class` is a smaller one of."""
    prefix: str = ""
    """Before the names in the class that the file's keys lack."""
    converter: str = ""
    """DiffSynth's function that puts it there."""
    is_small: bool = False
    """Whether it is made whole, with its own start; else each tensor is drawn as it is written."""

    def path(self, folder: Path) -> Path:
        return folder / f"{self.role}.safetensors"

    def on_meta(self) -> Any:
        """The network without values."""
        with torch.device("meta"):
            return self._make()

    def write(self, folder: Path) -> None:
        """Write random bf16 weights, unless they are there.

        Memory holds one tensor at a time, or the network if it is small.
        """
        described, written = (
            json.dumps([self.model_class, self.options]),
            self.path(folder).with_suffix(".json"),
        )
        if written.is_file() and written.read_text(encoding="utf-8") == described:
            return
        if self.is_small:
            torch.manual_seed(0)
            named = self._make().state_dict().items()
            tensors = {name.removeprefix(self.prefix): t.to(torch.bfloat16) for name, t in named}
            save_file(tensors, self.path(folder))
        else:
            shapes = {name: tuple(tensor.shape) for name, tensor in self.on_meta().state_dict().items()}
            write_streamed(self.path(folder), shapes, Noise())
        written.write_text(described, encoding="utf-8")

    def register(self, folder: Path) -> None:
        """Let DiffSynth recognize the file, which it does by a hash of keys and shapes."""
        from diffsynth.configs import MODEL_CONFIGS, VRAM_MANAGEMENT_MODULE_MAPS
        from diffsynth.core.loader import hash_model_file

        hashed = hash_model_file(str(self.path(folder)))
        entry = {"model_hash": hashed, "model_name": self.model_name, "model_class": self.model_class}
        if all(known["model_hash"] != hashed for known in MODEL_CONFIGS):
            converter = {"state_dict_converter": self.converter} if self.converter else {}
            MODEL_CONFIGS.append({**entry, **converter, "extra_kwargs": dict(self.options)})
        if self.base:
            maps = VRAM_MANAGEMENT_MODULE_MAPS
            maps[self.model_class] = maps[self.base]

    def _make(self) -> Any:
        module, _, name = self.model_class.rpartition(".")
        return getattr(importlib.import_module(module), name)(**self.options)


def write_streamed(path: Path, shapes: Mapping[str, tuple[int, ...]], noise: Noise) -> None:
    """Write a safetensors file of drawn bf16 weights, one tensor after the other."""
    header, end = {}, 0
    for name, shape in shapes.items():
        start, end = end, end + 2 * math.prod(shape)
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name, shape in shapes.items():
            file.write(noise.weight(name, shape).contiguous().view(torch.int16).numpy().data)


@dataclass(frozen=True, kw_only=True)
class Model:
    """A model that is trained, its encoders and the samples that it is trained on."""

    family: str
    transformer: Network
    encoders: tuple[Network, ...]
    targets: str
    """Layers that get a LoRA."""
    size: tuple[int, int, int]
    """Frames, height and width of a sample in pixels."""
    text: tuple[int, int]
    """Tokens and width of an encoded caption."""

    @property
    def networks(self) -> tuple[Network, ...]:
        return (self.transformer, *self.encoders)


_WAN = "diffsynth.models.wan_video_"
_I2V = {"in_dim": 36, "out_dim": 16, "eps": 1e-6, "patch_size": (1, 2, 2), "has_image_input": False}
_I2V |= {"require_clip_embedding": False}


def wan(*, tiny: bool, blocks: int | None) -> Model:
    """The high-noise expert of Wan 2.2 I2V-A14B, with UMT5-XXL and the VAE of Wan 2.1."""
    sizes = {"dim": 5120, "ffn_dim": 13824, "text_dim": 4096, "freq_dim": 256, "num_heads": 40}
    small = {"dim": 48, "ffn_dim": 64, "text_dim": 32, "freq_dim": 32, "num_heads": 2}
    options = _I2V | (small if tiny else sizes) | {"num_layers": blocks or (4 if tiny else 40)}
    narrow = {"vocab": 384, "dim": 32, "dim_attn": 32, "dim_ffn": 64, "num_heads": 4, "num_layers": 2}
    text = Network(
        role="text_encoder",
        model_name="wan_video_text_encoder",
        model_class=f"{_WAN}text_encoder.WanTextEncoder",
        options=narrow if tiny else {},
    )
    vae = f"{_WAN}vae.WanVideoVAE"
    return Model(
        family="wan",
        transformer=Network(
            role="dit", model_name="wan_video_dit", model_class=f"{_WAN}dit.WanModel", options=options
        ),
        encoders=(
            text,
            Network(
                role="vae",
                model_name="wan_video_vae",
                model_class="diffsynth_classes.NarrowVAE" if tiny else vae,
                base=vae if tiny else "",
                prefix="model.",
                converter="diffsynth.utils.state_dict_converters.wan_video_vae.WanVideoVAEStateDictConverter",
                is_small=True,
            ),
        ),
        targets="q,k,v,o,ffn.0,ffn.2",
        size=(5, 32, 32) if tiny else (49, 480, 832),
        text=(5, 32) if tiny else (512, 4096),
    )


def flux2(*, tiny: bool, blocks: int | None, text_layers: int) -> Model:
    """FLUX.2-dev, with Mistral-3 and its VAE."""
    doubles, singles = (2, 4) if tiny else (8, 48)
    if blocks is not None:
        doubles = max(1, round(blocks * doubles / (doubles + singles)))
        singles = blocks - doubles
    options: dict[str, Any] = {"num_layers": doubles, "num_single_layers": singles}
    if tiny:
        options |= {"attention_head_dim": 16, "num_attention_heads": 2, "joint_attention_dim": 96}
        options |= {"timestep_guidance_channels": 32, "axes_dims_rope": (4, 4, 4, 4)}
    text = "diffsynth.models.flux2_text_encoder.Flux2TextEncoder"
    return Model(
        family="flux2",
        transformer=Network(
            role="dit",
            model_name="flux2_dit",
            model_class="diffsynth.models.flux2_dit.Flux2DiT",
            options=options,
        ),
        encoders=(
            Network(
                role="text_encoder",
                model_name="flux2_text_encoder",
                model_class="diffsynth_classes.CutMistral",
                options={"layers": text_layers, "narrow": tiny},
                base=text,
            ),
            Network(
                role="vae",
                model_name="flux2_vae",
                model_class="diffsynth.models.flux2_vae.Flux2VAE",
                options={"block_out_channels": (8, 8, 16, 16), "num_groups": 8} if tiny else {},
                is_small=True,
            ),
        ),
        targets="to_q,to_k,to_v,to_out.0,add_q_proj,add_k_proj,add_v_proj,to_add_out,linear_in,linear_out,"
        "to_qkv_mlp_proj",
        size=(1, 32, 32) if tiny else (1, 1024, 1024),
        text=(512, 96 if tiny else 15360),
    )


def model_of(name: str, *, tiny: bool, blocks: int | None, text_layers: int) -> Model:
    """`wan` or `flux2`; `blocks` shortens the transformer, `text_layers` is of Mistral-3."""
    if name == "wan":
        return wan(tiny=tiny, blocks=blocks)
    return flux2(tiny=tiny, blocks=blocks, text_layers=text_layers)
