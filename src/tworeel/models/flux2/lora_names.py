"""Names of FLUX.2's layers: those of its authors' code ("native") and those of diffusers.

The authors keep query, key and value of a double block in one layer, `qkv`; its rows are those of diffusers'
three layers, one after the other. The two halves of the last layer's modulation stand the other way round.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

_TOP = {
    "img_in": "x_embedder",
    "txt_in": "context_embedder",
    "time_in.in_layer": "time_guidance_embed.timestep_embedder.linear_1",
    "time_in.out_layer": "time_guidance_embed.timestep_embedder.linear_2",
    "guidance_in.in_layer": "time_guidance_embed.guidance_embedder.linear_1",
    "guidance_in.out_layer": "time_guidance_embed.guidance_embedder.linear_2",
    "double_stream_modulation_img.lin": "double_stream_modulation_img.linear",
    "double_stream_modulation_txt.lin": "double_stream_modulation_txt.linear",
    "single_stream_modulation.lin": "single_stream_modulation.linear",
    "final_layer.linear": "proj_out",
    "final_layer.adaLN_modulation.1": "norm_out.linear",
}
_DOUBLE = {
    "img_attn.proj": "attn.to_out.0",
    "txt_attn.proj": "attn.to_add_out",
    "img_mlp.0": "ff.linear_in",
    "img_mlp.2": "ff.linear_out",
    "txt_mlp.0": "ff_context.linear_in",
    "txt_mlp.2": "ff_context.linear_out",
}
_FUSED = {
    "img_attn.qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
    "txt_attn.qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
}
_SINGLE = {"linear1": "attn.to_qkv_mlp_proj", "linear2": "attn.to_out"}

_NATIVE_BLOCK = re.compile(r"(double|single)_blocks\.(\d+)\.(.+)")
_OWN_BLOCK = re.compile(r"(single_)?transformer_blocks\.(\d+)\.(.+)")

SWAPPED = ("norm_out.linear",)
"""diffusers' layers whose two halves of rows stand the other way round in the authors' code."""


def native_parts(name: str) -> tuple[str, ...]:
    """Return diffusers' layers whose rows a native layer holds, in its order; () for an unknown name.

    >>> native_parts("double_blocks.0.img_attn.qkv")[1]
    'transformer_blocks.0.attn.to_k'
    """
    block = _NATIVE_BLOCK.fullmatch(name)
    if block is None:
        return (_TOP[name],) if name in _TOP else ()
    kind, index, layer = block.groups()
    if kind == "single":
        return (f"single_transformer_blocks.{index}.{_SINGLE[layer]}",) if layer in _SINGLE else ()
    layers = _FUSED.get(layer) or ((_DOUBLE[layer],) if layer in _DOUBLE else ())
    return tuple(f"transformer_blocks.{index}.{part}" for part in layers)


def from_native(name: str) -> str:
    """Turn the authors' name of a layer into diffusers'; of a fused one, into that of its first part."""
    return next(iter(native_parts(name)), name)


def to_native(name: str) -> str:
    """Turn diffusers' name of a layer into the authors': that of the fused layer for query, key and value."""
    block = _OWN_BLOCK.fullmatch(name)
    if block is None:
        return _TOP_INVERSE.get(name, name)
    single, index, layer = block.groups()
    table, blocks = (_SINGLE_INVERSE, "single_blocks") if single else (_DOUBLE_INVERSE, "double_blocks")
    return f"{blocks}.{index}.{table[layer]}" if layer in table else name


def _inverse(table: Mapping[str, str]) -> dict[str, str]:
    return {own: native for native, own in table.items()}


_TOP_INVERSE = _inverse(_TOP)
_SINGLE_INVERSE = _inverse(_SINGLE)
_DOUBLE_INVERSE = _inverse(_DOUBLE) | {own: native for native, parts in _FUSED.items() for own in parts}


def _underscored(*names: str) -> tuple[str, ...]:
    """Return the parts of names that hold an underscore of their own."""
    return tuple(sorted({part for name in names for part in name.split(".") if "_" in part}))


NATIVE_WORDS = _underscored(*_TOP, *_DOUBLE, *_FUSED, "double_blocks", "single_blocks")
"""Parts of native names with an underscore of their own: kohya's LoRA files run them into the others."""
OWN_WORDS = _underscored(
    *_TOP.values(),
    *_SINGLE.values(),
    *_DOUBLE_INVERSE,
    "transformer_blocks",
    "single_transformer_blocks",
)
"""The same of diffusers' names, for the files that run those together."""
