"""Tiny Wan transformers with random weights, written as real checkpoints are: same names, keys and folders.

The same seed gives the same values in each layout:

- `native`: sharded safetensors with an index and a `config.json`, at the root or in `high_noise_model/` and
  `low_noise_model/`;
- `diffusers`: `model_index.json`, `transformer/` and, for two experts, `transformer_2/`;
- `comfyui`: one file for each transformer, named as the published ones, if wanted as `fp8_scaled`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import WanTransformer3DModel
from huggingface_hub import save_torch_state_dict
from safetensors.torch import save_file
from torch import Tensor, nn

from tworeel.demo.tiny_encoders import IMAGE_TOKENS, IMAGE_WIDTH
from tworeel.models.family import Layout
from tworeel.models.wan.keys import to_native
from tworeel.models.wan.variants import EXPERTS, HEAD_DIM, takes_expert

_VARIANTS: dict[str, dict[str, Any]] = {
    "wan2.1-t2v-1.3b": {"in": 16, "out": 16, "type": "t2v", "file": "wan2.1_t2v_1.3B"},
    "wan2.1-t2v-14b": {"in": 16, "out": 16, "type": "t2v", "file": "wan2.1_t2v_14B"},
    "wan2.1-i2v-14b": {"in": 36, "out": 16, "type": "i2v", "file": "wan2.1_i2v_480p_14B", "images": 1},
    "wan2.1-flf2v-14b": {"in": 36, "out": 16, "type": "flf2v", "file": "wan2.1_flf2v_720p_14B", "images": 2},
    "wan2.2-t2v-a14b": {"in": 16, "out": 16, "type": "t2v", "file": "wan2.2_t2v_{expert}_noise_14B"},
    "wan2.2-i2v-a14b": {"in": 36, "out": 16, "type": "i2v", "file": "wan2.2_i2v_{expert}_noise_14B"},
    "wan2.2-ti2v-5b": {"in": 48, "out": 48, "type": "ti2v", "file": "wan2.2_ti2v_5B"},
}

_DTYPE_NAMES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}
_FP8 = torch.float8_e4m3fn


def write_transformer(
    folder: Path,
    *,
    variant: str,
    layout: Layout,
    dtype: torch.dtype = torch.bfloat16,
    seed: int = 0,
    num_layers: int = 4,
    dim: int = 256,
    ffn_dim: int = 512,
    text_dim: int = 64,
    fp8_scaled: bool = False,
    prefix: str = "",
) -> Path:
    """Write a tiny transformer (both experts, with different values, of a variant that has two).

    Args:
        folder: the model's folder; encoders of the same layout belong into it too.
        variant: a name of `tworeel.models.wan.variants`.
        layout: how keys, files and folders are named.
        dtype: of every tensor.
        fp8_scaled: ComfyUI only: quantize the blocks' linear weights; the values are no longer those of the
            other layouts.
        prefix: ComfyUI only: put before each key, for example `model.diffusion_model.`.

    Returns:
        What `model.path` has to be: the folder, or ComfyUI's single file.
    """
    assert layout == "comfyui" or not (fp8_scaled or prefix)
    config = _config(variant, num_layers=num_layers, dim=dim, ffn_dim=ffn_dim, text_dim=text_dim)
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for offset, expert in enumerate(EXPERTS if takes_expert(variant) else [None]):
        model: Any = tiny_transformer(config, seed + offset)
        tensors = {name: tensor.to(dtype) for name, tensor in model.state_dict().items()}
        if layout == "comfyui":
            name = _comfyui_name(variant, expert, "fp8_scaled" if fp8_scaled else _DTYPE_NAMES[dtype])
            paths.append(_write_single(folder / name, tensors, prefix, fp8_scaled))
        elif layout == "native":
            target = folder / f"{expert}_noise_model" if expert else folder
            _save_shards(target, {to_native(name): tensor for name, tensor in tensors.items()})
            _write_json(target / "config.json", _native_config(model.config, variant))
        else:
            target = folder / ("transformer_2" if expert == "low" else "transformer")
            _save_shards(target, tensors)
            model.save_config(target)
    if layout == "diffusers":
        _write_model_index(folder, variant)
    return paths[0] if len(paths) == 1 else folder


def tiny_transformer(config: Mapping[str, Any], seed: int) -> nn.Module:
    """Build diffusers' transformer with its own initialization, leaving the global random state as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        model: Any = WanTransformer3DModel(**config)
    return model.eval().requires_grad_(False)


def _config(variant: str, *, num_layers: int, dim: int, ffn_dim: int, text_dim: int) -> dict[str, Any]:
    facts = _VARIANTS[variant]
    images = facts.get("images", 0)
    return {
        "num_attention_heads": dim // HEAD_DIM,
        "attention_head_dim": HEAD_DIM,
        "in_channels": facts["in"],
        "out_channels": facts["out"],
        "text_dim": text_dim,
        "ffn_dim": ffn_dim,
        "num_layers": num_layers,
        "image_dim": IMAGE_WIDTH if images else None,
        "added_kv_proj_dim": dim if images else None,
        "pos_embed_seq_len": 2 * IMAGE_TOKENS if images == 2 else None,
    }


def _native_config(config: Any, variant: str) -> dict[str, Any]:
    """Return what the authors' `config.json` says, from diffusers' configuration."""
    return {
        "_class_name": "WanModel",
        "_diffusers_version": "0.30.0",
        "model_type": _VARIANTS[variant]["type"],
        "dim": config.num_attention_heads * config.attention_head_dim,
        "num_heads": config.num_attention_heads,
        "ffn_dim": config.ffn_dim,
        "freq_dim": config.freq_dim,
        "in_dim": config.in_channels,
        "out_dim": config.out_channels,
        "num_layers": config.num_layers,
        "text_len": 512,
        "eps": config.eps,
    }


def _save_shards(folder: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write two or three shards and their index."""
    folder.mkdir(parents=True, exist_ok=True)
    total = sum(tensor.nbytes for tensor in tensors.values())
    save_torch_state_dict(
        dict(tensors),
        folder,
        filename_pattern="diffusion_pytorch_model{suffix}.safetensors",
        max_shard_size=total // 2 + 1,
    )


def _write_model_index(folder: Path, variant: str) -> None:
    networks = {
        "scheduler": ["diffusers", "UniPCMultistepScheduler"],
        "text_encoder": ["transformers", "UMT5EncoderModel"],
        "tokenizer": ["transformers", "T5TokenizerFast"],
        "transformer": ["diffusers", "WanTransformer3DModel"],
        "vae": ["diffusers", "AutoencoderKLWan"],
    }
    kind = _VARIANTS[variant]["type"]
    if "images" in _VARIANTS[variant]:
        networks["image_encoder"] = ["transformers", "CLIPVisionModel"]
    options: dict[str, Any] = {"expand_timesteps": kind == "ti2v"}
    if takes_expert(variant):
        networks["transformer_2"] = networks["transformer"]
        options["boundary_ratio"] = 0.9 if kind == "i2v" else 0.875
    pipeline = "WanPipeline" if kind in ("t2v", "ti2v") else "WanImageToVideoPipeline"
    _write_json(folder / "model_index.json", {"_class_name": pipeline, **options, **networks})


def _comfyui_name(variant: str, expert: str | None, ending: str) -> str:
    return f"{_VARIANTS[variant]['file'].format(expert=expert)}_{ending}.safetensors"


def _write_single(path: Path, tensors: Mapping[str, Tensor], prefix: str, fp8_scaled: bool) -> Path:
    native = {to_native(name): tensor for name, tensor in tensors.items()}
    if fp8_scaled:
        native = _quantized(native)
    save_file({f"{prefix}{name}": tensor for name, tensor in native.items()}, path)
    return path


def _quantized(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Quantize the blocks' linear weights as ComfyUI's `fp8_scaled` files do: one scale a weight."""
    quantized = {"scaled_fp8": torch.zeros(2, dtype=_FP8)}
    for name, tensor in tensors.items():
        if name.startswith("blocks.") and name.endswith(".weight") and tensor.dim() == 2:
            scale = tensor.float().abs().max() / torch.finfo(_FP8).max
            quantized[name] = (tensor.float() / scale).to(_FP8)
            quantized[name.removesuffix("weight") + "scale_weight"] = scale
            quantized[name.removesuffix("weight") + "scale_input"] = torch.ones(())
        else:
            quantized[name] = tensor
    return quantized


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
