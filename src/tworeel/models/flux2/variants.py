"""Which FLUX.2 model a transformer file is, from the names and shapes in its header.

The structure decides, not the size, so that tiny models of any width are recognized: dev embeds the guidance
scale, klein does not. klein's sizes have different widths; its base models have the same shapes as the
distilled ones and are told by what their files or folders say.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from diffusers import Flux2Transformer2DModel

from tworeel.errors import UserError
from tworeel.models.family import Traits
from tworeel.models.flux2.conditioning import TEXT_TOKENS

FAMILY = "flux2"
SUPPORTED = "FLUX.2-dev and FLUX.2-klein (4B, 9B and their base models)"
PIPELINES = ("Flux2Pipeline", "Flux2KleinPipeline", "Flux2KleinInpaintPipeline")
SMALL_WIDTH = 3072
REFERENCE_IMAGES = 10
REFERENCE_AREA = 1024 * 1024
TRAINING_SHIFT = math.exp(0.8)
"""The authors shift by e^mu; this is their mu for images of one megapixel over many steps."""

Shapes = Mapping[str, tuple[int, ...]]
"""Shapes by parameter name, in diffusers' spelling."""

_FIRST, _SINGLE = "transformer_blocks.0", "single_transformer_blocks.0"
_TIME = "time_guidance_embed.timestep_embedder.linear_1.weight"
_GUIDANCE = "time_guidance_embed.guidance_embedder.linear_1.weight"
_EVIDENCE = (
    "x_embedder.weight",
    "context_embedder.weight",
    "proj_out.weight",
    "single_stream_modulation.linear.weight",
    "double_stream_modulation_img.linear.weight",
    _TIME,
    f"{_FIRST}.attn.norm_q.weight",
    f"{_FIRST}.ff.linear_out.weight",
    f"{_SINGLE}.attn.to_qkv_mlp_proj.weight",
)
# FLUX.1 has a modulation in each block, in its authors' spelling or diffusers'.
_FLUX1 = ("double_blocks.0.img_mod.lin.weight", "transformer_blocks.0.norm1_context.linear.weight")


def is_flux2(shapes: Shapes) -> bool:
    """Tell whether these are a FLUX.2 transformer's parameters."""
    return all(name in shapes for name in _EVIDENCE)


def is_flux1(names: Iterable[str]) -> bool:
    """Tell whether these are keys of a FLUX.1 transformer, with or without a prefix."""
    return any(name.endswith(_FLUX1) for name in names)


def refuse_pipeline(place: str, class_name: str) -> None:
    """Raise UserError if a `model_index.json` is of a FLUX model that is not supported."""
    if class_name not in PIPELINES:
        raise UserError(f"{place}: a {class_name}, which is not supported yet; supported are {SUPPORTED}")


def transformer_config(shapes: Shapes, config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments of `Flux2Transformer2DModel`.

    Args:
        shapes: the file's parameters.
        config: the `config.json` beside the file; empty if there is none. What it says counts over the
            shapes, so that layers that a file lacks are missed when it is loaded.

    Raises:
        UserError: the width is no multiple of the head dimension, or that of the rotary axes.
    """
    accepted = inspect.signature(Flux2Transformer2DModel.__init__).parameters
    known = {key: value for key, value in config.items() if key in accepted}
    found = {**_config_from_shapes(shapes), **known}
    width, head = shapes["x_embedder.weight"][0], found["attention_head_dim"]
    if width != head * found["num_attention_heads"] or sum(found["axes_dims_rope"]) != head:
        heads = f"{found['num_attention_heads']} heads of {head}"
        axes = tuple(found["axes_dims_rope"])
        raise UserError(
            f"transformer width {width} does not fit {heads} with rotary axes {axes}; "
            "a config.json beside it can say more"
        )
    return found


def variant_name(shapes: Shapes, *, is_base: bool) -> str:
    """Name the variant.

    Args:
        is_base: whether the files say that a klein model is not distilled.
    """
    if _GUIDANCE in shapes:
        return "flux2-dev"
    size = "4b" if shapes["x_embedder.weight"][0] <= SMALL_WIDTH else "9b"
    return f"flux2-klein-base-{size}" if is_base else f"flux2-klein-{size}"


def says_base(path: Path) -> bool:
    """Tell whether a file's or its folder's name speaks of a base model: `flux-2-klein-base-4b`."""
    return any("klein" in name.lower() and "base" in name.lower() for name in (path.name, path.parent.name))


def traits(variant: str) -> Traits:
    """Return what data and training must know of a variant."""
    return Traits(
        family=FAMILY,
        variant=variant,
        images_only=True,
        frame_rate=1.0,
        spatial_multiple=16,
        temporal_stride=1,
        tokens_per_pixel_area=256,
        joint_text_tokens=TEXT_TOKENS,
        reference_images=REFERENCE_IMAGES,
        reference_area=REFERENCE_AREA,
        training_shift=TRAINING_SHIFT,
    )


def _config_from_shapes(shapes: Shapes) -> dict[str, Any]:
    width, channels = shapes["x_embedder.weight"]
    head = shapes[f"{_FIRST}.attn.norm_q.weight"][0]
    return {
        "patch_size": 1,
        "in_channels": channels,
        "out_channels": shapes["proj_out.weight"][0],
        "num_layers": _num_blocks(shapes, "transformer_blocks."),
        "num_single_layers": _num_blocks(shapes, "single_transformer_blocks."),
        "attention_head_dim": head,
        "num_attention_heads": width // head,
        "joint_attention_dim": shapes["context_embedder.weight"][1],
        "timestep_guidance_channels": shapes[_TIME][1],
        "mlp_ratio": shapes[f"{_FIRST}.ff.linear_out.weight"][1] / width,
        "axes_dims_rope": (head // 4,) * 4,
        "guidance_embeds": _GUIDANCE in shapes,
    }


def _num_blocks(shapes: Shapes, prefix: str) -> int:
    return 1 + max(int(name.split(".")[1]) for name in shapes if name.startswith(prefix))
