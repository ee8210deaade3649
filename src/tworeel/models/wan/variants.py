"""Which Wan model a transformer file is, from the names and shapes in its header.

The structure decides, not the size, so that tiny models of any width are recognized:

| in | CLIP `img_emb` | `pos_embed` | out | variant |
|----|----------------|-------------|-----|---------|
| 16 | no  | no  | 16 | T2V (width <= 1536: 1.3B, else 14B; with an expert: 2.2 A14B) |
| 36 | yes | no  | 16 | Wan 2.1 I2V |
| 36 | yes | yes | 16 | Wan 2.1 FLF2V |
| 36 | no  | no  | 16 | Wan 2.2 I2V A14B |
| 48 | no  | no  | 48 | Wan 2.2 TI2V 5B |
"""

from __future__ import annotations

import inspect
import math
import re
from collections.abc import Mapping
from typing import Any

from diffusers import WanTransformer3DModel

from tworeel.errors import UserError
from tworeel.models.family import Traits

FAMILY = "wan"
HEAD_DIM = 128
SMALL_WIDTH = 1536
SHIFT = 5.0
EXPERTS = ("high", "low")

Shapes = Mapping[str, tuple[int, ...]]
"""Shapes by parameter name, in diffusers' spelling."""

_EVIDENCE = (
    "patch_embedding.weight",
    "condition_embedder.time_proj.weight",
    "condition_embedder.time_embedder.linear_1.weight",
    "condition_embedder.text_embedder.linear_1.weight",
    "blocks.0.attn1.to_q.weight",
    "blocks.0.ffn.net.0.proj.weight",
    "proj_out.weight",
)

# Parts that only these kinds have, most telling first: every S2V file also has blocks like T2V's.
_OTHER_KINDS = {
    "vace_blocks": "VACE",
    "face_adapter": "Animate",
    "motion_encoder": "Animate",
    "casual_audio_encoder": "S2V",
    "audio_injector": "S2V",
    "trainable_cond_mask": "S2V",
    "music_injector": "Dancer",
    "control_adapter": "Fun-Camera",
    "ref_conv": "Fun-Control",
}

_BOUNDARY_INDEX = {"wan2.2-t2v-a14b": 417, "wan2.2-i2v-a14b": 358}

_NATIVE_KEYS = {
    "in_dim": "in_channels",
    "out_dim": "out_channels",
    "num_heads": "num_attention_heads",
    "ffn_dim": "ffn_dim",
    "freq_dim": "freq_dim",
    "num_layers": "num_layers",
    "text_dim": "text_dim",
    "eps": "eps",
}


def is_wan(shapes: Shapes) -> bool:
    """Tell whether these are a Wan transformer's parameters, of a supported kind or not."""
    return all(name in shapes for name in _EVIDENCE)


def unsupported_kind(shapes: Shapes) -> str | None:
    """Name the kind of Wan model if it is one that is not supported yet."""
    parts = {part for name in shapes for part in name.split(".")[:2]}
    for part, kind in _OTHER_KINDS.items():
        if part in parts:
            return kind
    if _structure(shapes) not in _STRUCTURES:
        channels = shapes["patch_embedding.weight"][1]
        return {52: "Fun-Control", 32: "Fun-Camera", 48: "Fun-Control"}.get(channels, f"{channels}-channel")
    return None


def transformer_config(shapes: Shapes, config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments of `WanTransformer3DModel`.

    Args:
        shapes: the file's parameters.
        config: the `config.json` beside the file, diffusers' or the authors'; empty if there is none. What it
            says counts over the shapes, so that layers that a file lacks are missed when it is loaded.

    Raises:
        UserError: the width is no multiple of the head dimension.
    """
    found = {**_config_from_shapes(shapes), **_known_arguments(config)}
    width = shapes["patch_embedding.weight"][0]
    found.setdefault("num_attention_heads", width // found["attention_head_dim"])
    if found["num_attention_heads"] * found["attention_head_dim"] != width:
        heads = f"{found['num_attention_heads']} heads of {found['attention_head_dim']}"
        raise UserError(
            f"transformer width {width} does not fit {heads}; a config.json beside it can say more"
        )
    return found


def variant_name(shapes: Shapes, *, has_experts: bool) -> str:
    """Name the variant of a supported structure (`unsupported_kind` is None).

    Args:
        has_experts: whether the files say that this is one of two experts; the 14B T2V of 2.1 and the
            experts of 2.2 have the same shapes.
    """
    name = _STRUCTURES[_structure(shapes)]
    if name != "t2v":
        return name
    if has_experts:
        return "wan2.2-t2v-a14b"
    return "wan2.1-t2v-1.3b" if shapes["patch_embedding.weight"][0] <= SMALL_WIDTH else "wan2.1-t2v-14b"


def takes_expert(variant: str) -> bool:
    """Tell whether a variant consists of a high-noise and a low-noise expert."""
    return variant in _BOUNDARY_INDEX


def needs_image_encoder(variant: str) -> bool:
    """Tell whether a variant sees its condition images through CLIP."""
    return variant in ("wan2.1-i2v-14b", "wan2.1-flf2v-14b")


def traits(variant: str, expert: str | None) -> Traits:
    """Return what data and training must know of a variant."""
    large_vae = variant == "wan2.2-ti2v-5b"
    return Traits(
        family=FAMILY,
        variant=variant,
        expert=expert,
        frame_rate=24.0 if large_vae else 16.0,
        spatial_multiple=32 if large_vae else 16,
        temporal_stride=4,
        tokens_per_pixel_area=1024 if large_vae else 256,
        image_inputs=_image_inputs(variant),
        image_optional=large_vae,
        sigma_range=_sigma_range(variant, expert),
        shift=SHIFT,
    )


def expert_in_name(name: str) -> str | None:
    """Return the expert that a file or folder name speaks of: `…_high_noise_14B`, `A14B-LOW`, `LowNoise`.

    >>> expert_in_name("wan2.2_t2v_high_noise_14B_fp16.safetensors")
    'high'
    """
    words = re.findall(r"(?<![a-z])(high|low)(?![a-z])|(high|low)[-_ ]?noise", name.lower())
    found = {word or noise for word, noise in words}
    return found.pop() if len(found) == 1 else None


def _structure(shapes: Shapes) -> tuple[int, int, bool, bool]:
    patch = shapes["patch_embedding.weight"]
    return (
        patch[1],
        shapes["proj_out.weight"][0] // math.prod(patch[2:]),
        "condition_embedder.image_embedder.norm1.weight" in shapes,
        "condition_embedder.image_embedder.pos_embed" in shapes,
    )


_STRUCTURES = {
    (16, 16, False, False): "t2v",
    (36, 16, True, False): "wan2.1-i2v-14b",
    (36, 16, True, True): "wan2.1-flf2v-14b",
    (36, 16, False, False): "wan2.2-i2v-a14b",
    (48, 48, False, False): "wan2.2-ti2v-5b",
}


def _config_from_shapes(shapes: Shapes) -> dict[str, Any]:
    in_channels, out_channels, has_image, has_position = _structure(shapes)
    image = "condition_embedder.image_embedder"
    return {
        "patch_size": shapes["patch_embedding.weight"][2:],
        "attention_head_dim": HEAD_DIM,
        "in_channels": in_channels,
        "out_channels": out_channels,
        "text_dim": shapes["condition_embedder.text_embedder.linear_1.weight"][1],
        "freq_dim": shapes["condition_embedder.time_embedder.linear_1.weight"][1],
        "ffn_dim": shapes["blocks.0.ffn.net.0.proj.weight"][0],
        "num_layers": 1 + max(int(name.split(".")[1]) for name in shapes if name.startswith("blocks.")),
        "cross_attn_norm": "blocks.0.norm2.weight" in shapes,
        "qk_norm": "rms_norm_across_heads" if "blocks.0.attn1.norm_q.weight" in shapes else None,
        "image_dim": shapes[f"{image}.norm1.weight"][0] if has_image else None,
        "added_kv_proj_dim": shapes.get("blocks.0.attn2.add_k_proj.weight", (None, None))[1],
        "pos_embed_seq_len": shapes[f"{image}.pos_embed"][1] if has_position else None,
    }


def _known_arguments(config: Mapping[str, Any]) -> dict[str, Any]:
    """Translate a `config.json`; entries that the class does not take are left out."""
    if "num_attention_heads" in config:
        accepted = inspect.signature(WanTransformer3DModel.__init__).parameters
        return {key: value for key, value in config.items() if key in accepted}
    known = {ours: config[theirs] for theirs, ours in _NATIVE_KEYS.items() if theirs in config}
    if "dim" in config and "num_heads" in config:
        known["attention_head_dim"] = config["dim"] // config["num_heads"]
    return known


def _image_inputs(variant: str) -> tuple[str, ...]:
    if variant == "wan2.1-flf2v-14b":
        return ("first_image", "last_image")
    return () if "-t2v-" in variant else ("first_image",)


def _sigma_range(variant: str, expert: str | None) -> tuple[float, float]:
    """Return the expert's share of sigma.

    The authors' schedule has 1000 noise levels s = 1 - i/1000, shifted to sigma = 5s / (1 + 4s). The
    high-noise expert has those before index 417 (T2V: sigma 0.87485) or 358 (I2V: sigma 0.89966), the
    low-noise expert the rest: that level itself is the low-noise expert's first.
    """
    if variant not in _BOUNDARY_INDEX or expert is None:
        return (0.0, 1.0)
    level = 1 - _BOUNDARY_INDEX[variant] / 1000
    boundary = SHIFT * level / (1 + (SHIFT - 1) * level)
    return (boundary, 1.0) if expert == "high" else (0.0, boundary)
