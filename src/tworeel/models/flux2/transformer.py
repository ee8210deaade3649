"""FLUX.2's transformer: diffusers' class, and what training must know of its parts."""

from __future__ import annotations

from accelerate import init_empty_weights
from diffusers import Flux2Transformer2DModel
from torch import nn

from tworeel.models.family import Component

BLOCK_LISTS = ("transformer_blocks", "single_transformer_blocks")

KEEP_FP32: tuple[str, ...] = tuple(Flux2Transformer2DModel._keep_in_fp32_modules or ())
"""A parameter stays in fp32 if one of these is a dotted part of its name."""

_DOUBLE_ATTENTION = (
    "attn.to_q",
    "attn.to_k",
    "attn.to_v",
    "attn.to_out.0",
    "attn.add_q_proj",
    "attn.add_k_proj",
    "attn.add_v_proj",
    "attn.to_add_out",
)
_FEED_FORWARD = ("ff.linear_in", "ff.linear_out", "ff_context.linear_in", "ff_context.linear_out")
# Attention and feed-forward are one layer each way here.
_SINGLE = ("attn.to_qkv_mlp_proj", "attn.to_out")

LORA_PRESETS: dict[str, tuple[str, ...]] = {
    "attention": (*_DOUBLE_ATTENTION, *_SINGLE),
    "all-linear": (*_DOUBLE_ATTENTION, *_FEED_FORWARD, *_SINGLE),
}
"""Endings of module names by preset."""


def build_transformer(component: Component) -> nn.Module:
    """Make the transformer on the meta device."""
    with init_empty_weights(include_buffers=False):
        model: nn.Module = Flux2Transformer2DModel(**component.config)  # type: ignore[assignment]
    return model
