"""Names in FLUX.2's transformer: those of its authors' code ("native") and those of diffusers.

The authors fuse query, key and value of the double blocks into one layer, and the last modulation has shift
before scale where diffusers has scale before shift.
"""

from __future__ import annotations

import re

from tworeel.models.family import Layout
from tworeel.weights.rows import Names, Rows

_EMBEDDER = "time_guidance_embed"

_TOP = {
    "img_in": "x_embedder",
    "txt_in": "context_embedder",
    "time_in.in_layer": f"{_EMBEDDER}.timestep_embedder.linear_1",
    "time_in.out_layer": f"{_EMBEDDER}.timestep_embedder.linear_2",
    "guidance_in.in_layer": f"{_EMBEDDER}.guidance_embedder.linear_1",
    "guidance_in.out_layer": f"{_EMBEDDER}.guidance_embedder.linear_2",
    "double_stream_modulation_img.lin": "double_stream_modulation_img.linear",
    "double_stream_modulation_txt.lin": "double_stream_modulation_txt.linear",
    "single_stream_modulation.lin": "single_stream_modulation.linear",
    "final_layer.linear": "proj_out",
    "final_layer.adaLN_modulation.1": "norm_out.linear",
}
_DOUBLE = {
    "img_attn.norm.query_norm": "attn.norm_q",
    "img_attn.norm.key_norm": "attn.norm_k",
    "img_attn.proj": "attn.to_out.0",
    "img_mlp.0": "ff.linear_in",
    "img_mlp.2": "ff.linear_out",
    "txt_attn.norm.query_norm": "attn.norm_added_q",
    "txt_attn.norm.key_norm": "attn.norm_added_k",
    "txt_attn.proj": "attn.to_add_out",
    "txt_mlp.0": "ff_context.linear_in",
    "txt_mlp.2": "ff_context.linear_out",
}
_SINGLE = {
    "linear1": "attn.to_qkv_mlp_proj",
    "linear2": "attn.to_out",
    "norm.query_norm": "attn.norm_q",
    "norm.key_norm": "attn.norm_k",
}
FUSED = {
    "img_attn.qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
    "txt_attn.qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
}
"""Layers of a double block that the authors keep as one, query first."""
SWAPPED = "norm_out.linear"
"""The layer whose halves stand the other way round."""

_LISTS = {
    "double_blocks": ("transformer_blocks", _DOUBLE),
    "single_blocks": ("single_transformer_blocks", _SINGLE),
}
_PARTS = {f"{fused}.{i}": name for fused, names in FUSED.items() for i, name in enumerate(names)}
_INVERSE = {
    "transformer_blocks": ("double_blocks", {ours: theirs for theirs, ours in (_DOUBLE | _PARTS).items()}),
    "single_transformer_blocks": ("single_blocks", {ours: theirs for theirs, ours in _SINGLE.items()}),
}
_TOP_INVERSE = {ours: theirs for theirs, ours in _TOP.items()}

_NATIVE_BLOCK = re.compile(r"(double_blocks|single_blocks)\.(\d+)\.(.+)")
_DIFFUSERS_BLOCK = re.compile(r"(transformer_blocks|single_transformer_blocks)\.(\d+)\.(.+)")

_NATIVE_NAMES = (*_TOP, *_DOUBLE, *_SINGLE, *FUSED, *_LISTS)
NATIVE_WORDS = tuple(sorted({part for name in _NATIVE_NAMES for part in name.split(".") if "_" in part}))
"""Parts of native names with an underscore of their own, which kohya's LoRA files run into the others."""
_PREFIXES = ("model.diffusion_model.", "diffusion_model.")


def parameter_name(layout: Layout, key: str) -> Names:
    """Turn a key of a transformer file into the parameters that its rows are.

    Single files come with or without a prefix and in either spelling: those keys are told apart one by one.
    """
    if layout == "diffusers":
        return key
    return _from_native(strip_prefix(key))


def strip_prefix(key: str) -> str:
    """Remove what ComfyUI's files put before a transformer's keys."""
    for prefix in _PREFIXES:
        key = key.removeprefix(prefix)
    return key


def to_native(name: str) -> str:
    """Turn diffusers' name of a module into the authors'; of a fused layer each part is numbered behind it.

    >>> to_native("transformer_blocks.0.attn.to_k")
    'double_blocks.0.img_attn.qkv.1'
    """
    block = _DIFFUSERS_BLOCK.fullmatch(name)
    if block is None:
        return _TOP_INVERSE.get(name, name)
    native_list, modules = _INVERSE[block[1]]
    return f"{native_list}.{block[2]}.{modules[block[3]]}" if block[3] in modules else name


def from_native(name: str) -> str:
    """The inverse of `to_native`."""
    block = _NATIVE_BLOCK.fullmatch(name)
    if block is None:
        return _TOP.get(name, name)
    diffusers_list, modules = _LISTS[block[1]]
    parts = modules | _PARTS if block[1] == "double_blocks" else modules
    return f"{diffusers_list}.{block[2]}.{parts[block[3]]}" if block[3] in parts else name


def _from_native(key: str) -> Names:
    module, _, leaf = key.rpartition(".")
    block = _NATIVE_BLOCK.fullmatch(module)
    if block is None:
        name = f"{_TOP.get(module, module)}.{leaf}"
        return (Rows(name, (1, 0), of=2),) if name.startswith(f"{SWAPPED}.") and module in _TOP else name
    list_name, index, part = block.groups()
    diffusers_list, modules = _LISTS[list_name]
    stem = f"{diffusers_list}.{index}"
    leaf = "weight" if leaf == "scale" else leaf  # of the norms
    if part in FUSED and list_name == "double_blocks":
        return tuple(Rows(f"{stem}.{name}.{leaf}", (i,), of=3) for i, name in enumerate(FUSED[part]))
    return f"{stem}.{modules.get(part, part)}.{leaf}"
