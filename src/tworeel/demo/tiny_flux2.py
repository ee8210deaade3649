"""A tiny FLUX.2 checkpoint with random weights, written as real ones are: same names, keys and folders.

The same seed gives the same values in each layout:

- `diffusers`: `model_index.json`, `transformer/` in shards and `vae/`;
- `native` and `comfyui`: one file for each network with the authors' names, if wanted as `fp8_scaled` and
  with ComfyUI's prefix. ComfyUI's are named as it publishes them.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKLFlux2, Flux2Transformer2DModel
from huggingface_hub import save_torch_state_dict
from safetensors.torch import save_file
from torch import Tensor, nn

from tworeel.models.family import Layout
from tworeel.models.flux2.keys import native_norm
from tworeel.models.flux2.lora_names import SWAPPED, native_parts, to_native

HEAD_DIM = 16
TEXT_DIM = 96
"""Of three concatenated hidden states of the tiny text encoder."""
LATENT_CHANNELS = 4

_FILES = {
    "flux2-dev": ("flux2-dev", "flux2_dev"),
    "flux2-klein-4b": ("flux-2-klein-4b", "flux-2-klein-4b"),
    "flux2-klein-base-4b": ("flux-2-klein-base-4b", "flux-2-klein-base-4b"),
}
"""File names of the authors' and of ComfyUI's, by variant."""
_VAE_NAMES = (
    (r"\b(down|up)_blocks\.(\d)\.resnets\.", r"\1.\2.block."),
    (r"\b(down|up)_blocks\.(\d)\.\w+samplers\.0\.", r"\1.\2.\1sample."),
    (r"mid_block\.resnets\.0", "mid.block_1"),
    (r"mid_block\.resnets\.1", "mid.block_2"),
    (r"mid_block\.attentions\.0\.", "mid.attn_1."),
    (r"attn_1\.group_norm", "attn_1.norm"),
    (r"attn_1\.to_out\.0", "attn_1.proj_out"),
    (r"attn_1\.to_", "attn_1."),
    (r"conv_norm_out", "norm_out"),
    (r"conv_shortcut", "nin_shortcut"),
    (r"^quant_conv", "encoder.quant_conv"),
    (r"^post_quant_conv", "decoder.post_quant_conv"),
)
_VAES = {"native": "ae.safetensors", "comfyui": "flux2-vae.safetensors"}
_FP8 = torch.float8_e4m3fn


def write_transformer(
    folder: Path,
    *,
    variant: str = "flux2-klein-4b",
    layout: Layout = "diffusers",
    dtype: torch.dtype = torch.bfloat16,
    seed: int = 0,
    fp8_scaled: bool = False,
    prefix: str = "",
    **changes: Any,
) -> Path:
    """Write a tiny transformer with two double and three single blocks.

    Args:
        folder: the model's folder; encoders of the same layout belong into it too.
        variant: a name of `tworeel.models.flux2.variants`.
        layout: how keys, files and folders are named.
        dtype: of every tensor.
        seed: of all values.
        fp8_scaled: not diffusers: quantize the blocks' linear weights.
        prefix: not diffusers: put before each key, for example `model.diffusion_model.`.
        changes: of the configuration of `Flux2Transformer2DModel`.

    Returns:
        What `model.path` has to be: the folder or the single file.
    """
    assert layout != "diffusers" or not (fp8_scaled or prefix)
    model: Any = tiny_transformer(variant, seed, **changes)
    tensors = {name: tensor.to(dtype) for name, tensor in model.state_dict().items()}
    folder.mkdir(parents=True, exist_ok=True)
    if layout == "diffusers":
        _save_shards(folder / "transformer", tensors)
        model.save_config(folder / "transformer")
        write_model_index(folder, variant)
        return folder
    native = dict(native_tensors(tensors))
    if fp8_scaled:
        native = _quantized(native)
    name = _FILES[variant][layout == "comfyui"] + ("_fp8_scaled" if fp8_scaled else "")
    path = folder / f"{name}.safetensors"
    save_file({f"{prefix}{key}": tensor.contiguous() for key, tensor in native.items()}, path)
    return path


def tiny_transformer(variant: str, seed: int = 0, **changes: Any) -> nn.Module:
    """Build diffusers' transformer with its own initialization, leaving the global random state as it was."""
    config = {
        "in_channels": 4 * LATENT_CHANNELS,
        "num_layers": 2,
        "num_single_layers": 3,
        "attention_head_dim": HEAD_DIM,
        "num_attention_heads": 2,
        "joint_attention_dim": TEXT_DIM,
        "timestep_guidance_channels": 32,
        "axes_dims_rope": (HEAD_DIM // 4,) * 4,
        "guidance_embeds": variant == "flux2-dev",
    }
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        model: Any = Flux2Transformer2DModel(**config | changes)
    return model.eval().requires_grad_(False)


def write_vae(folder: Path, layout: Layout = "diffusers", *, seed: int = 0) -> Path:
    """Write a tiny VAE, decoder included; return its folder or file."""
    vae = tiny_vae(seed)
    if layout == "diffusers":
        vae.save_pretrained(folder / "vae")
        return folder / "vae"
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / _VAES[layout]
    save_file(native_vae(vae.state_dict()), path)
    return path


def tiny_vae(seed: int = 0) -> Any:
    """Build diffusers' VAE with the strides of the real one, and statistics that are not trivial."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        vae: Any = AutoencoderKLFlux2(
            block_out_channels=(8, 8, 16, 16),
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            layers_per_block=2,
            latent_channels=LATENT_CHANNELS,
            norm_num_groups=8,
        )
        vae.bn.running_mean.normal_()
        vae.bn.running_var.uniform_(0.5, 2.0)
    return vae.eval().requires_grad_(False)


def native_tensors(tensors: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """Give a transformer's tensors the authors' names and forms."""
    for name, tensor in tensors.items():
        module, _, leaf = name.rpartition(".")
        native = to_native(module)
        parts = native_parts(native)
        if module in SWAPPED:
            yield f"{native}.{leaf}", torch.cat(tensor.chunk(2)[::-1])
        elif not parts:
            yield f"{native_norm(module)}.scale", tensor
        elif module == parts[0]:
            yield f"{native}.{leaf}", torch.cat([tensors[f"{part}.{leaf}"] for part in parts])


def native_vae(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Give a VAE's tensors the authors' names and forms: attention in convolutions of 1×1."""
    return {
        _native_vae_name(name): tensor[..., None, None] if _is_projection(name) else tensor
        for name, tensor in tensors.items()
    }


def _is_projection(name: str) -> bool:
    return ".attentions." in name and "group_norm" not in name and name.endswith(".weight")


def _native_vae_name(name: str) -> str:
    for pattern, theirs in _VAE_NAMES:
        name = re.sub(pattern, theirs, name)
    # The decoder's stages are counted from the other end.
    return re.sub(r"\.up\.(\d)", lambda match: f".up.{3 - int(match[1])}", name)


def _save_shards(folder: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write two or three shards and their index."""
    folder.mkdir(parents=True, exist_ok=True)
    save_torch_state_dict(
        dict(tensors),
        folder,
        filename_pattern="diffusion_pytorch_model{suffix}.safetensors",
        max_shard_size=sum(tensor.nbytes for tensor in tensors.values()) // 2 + 1,
    )


def write_model_index(folder: Path, variant: str) -> None:
    """Write what says which classes a folder's networks are of."""
    is_dev = variant == "flux2-dev"
    text = ("Mistral3ForConditionalGeneration", "PixtralProcessor")
    text_encoder, tokenizer = text if is_dev else ("Qwen3ForCausalLM", "Qwen2TokenizerFast")
    index: dict[str, Any] = {
        "_class_name": "Flux2Pipeline" if is_dev else "Flux2KleinPipeline",
        "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
        "text_encoder": ["transformers", text_encoder],
        "tokenizer": ["transformers", tokenizer],
        "transformer": ["diffusers", "Flux2Transformer2DModel"],
        "vae": ["diffusers", "AutoencoderKLFlux2"],
    }
    if not is_dev:
        index["is_distilled"] = "base" not in variant
    (folder / "model_index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _quantized(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Quantize the blocks' linear weights as ComfyUI's later `fp8_scaled` files do: one scale a weight."""
    form = torch.tensor(list(b'{"format": "float8_e4m3fn"}'), dtype=torch.uint8)
    quantized: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if "_blocks." not in name or tensor.dim() != 2:
            quantized[name] = tensor
            continue
        stem, scale = name.removesuffix("weight"), tensor.float().abs().max() / torch.finfo(_FP8).max
        quantized[name] = (tensor.float() / scale).to(_FP8)
        quantized |= {f"{stem}weight_scale": scale, f"{stem}comfy_quant": form.clone()}
    return quantized
