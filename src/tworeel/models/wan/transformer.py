"""Wan's transformer: diffusers' class, and what training must know of its parts."""

from __future__ import annotations

from accelerate import init_empty_weights
from diffusers import WanTransformer3DModel
from torch import nn

from tworeel.models.family import Component
from tworeel.models.wan.blocks import use_lean_blocks

BLOCK_LISTS = ("blocks",)

KEEP_FP32: tuple[str, ...] = tuple(WanTransformer3DModel._keep_in_fp32_modules)
"""A parameter stays in fp32 if one of these is a dotted part of its name."""

_ATTENTION = tuple(
    f"{attention}.{projection}"
    for attention in ("attn1", "attn2")
    for projection in ("to_q", "to_k", "to_v", "to_out.0")
)
_FEED_FORWARD = ("ffn.net.0.proj", "ffn.net.2")
_IMAGE_ATTENTION = ("attn2.add_k_proj", "attn2.add_v_proj")

LORA_PRESETS: dict[str, tuple[str, ...]] = {
    "attention": _ATTENTION,
    "all-linear": (*_ATTENTION, *_FEED_FORWARD),
    "all-linear-image": (*_ATTENTION, *_FEED_FORWARD, *_IMAGE_ATTENTION),
}
"""Endings of module names by preset. Only `all-linear-image` trains the keys and values of the CLIP image
(Wan 2.1 I2V and FLF2V), which other trainers leave alone."""


def build_transformer(component: Component) -> nn.Module:
    """Make the transformer on the meta device; its rotary tables are real, its blocks `LeanBlock`s."""
    with init_empty_weights(include_buffers=False):
        model: nn.Module = WanTransformer3DModel(**component.config)  # type: ignore[assignment]
    use_lean_blocks(model)
    return model
