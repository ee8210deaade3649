"""Names in Wan's transformer: those of its authors' code ("native") and those of diffusers.

Both tables are prefixes on whole dotted parts; whatever follows (`.weight`, `.lora_A.weight`) is kept.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from tworeel.models.family import Layout

_EMBEDDER = "condition_embedder"
_IMAGE = f"{_EMBEDDER}.image_embedder"

_TOP = {
    "time_embedding.0": f"{_EMBEDDER}.time_embedder.linear_1",
    "time_embedding.2": f"{_EMBEDDER}.time_embedder.linear_2",
    "time_projection.1": f"{_EMBEDDER}.time_proj",
    "text_embedding.0": f"{_EMBEDDER}.text_embedder.linear_1",
    "text_embedding.2": f"{_EMBEDDER}.text_embedder.linear_2",
    "img_emb": _IMAGE,
    "img_emb.emb_pos": f"{_IMAGE}.pos_embed",
    "img_emb.proj.0": f"{_IMAGE}.norm1",
    "img_emb.proj.1": f"{_IMAGE}.ff.net.0.proj",
    "img_emb.proj.3": f"{_IMAGE}.ff.net.2",
    "img_emb.proj.4": f"{_IMAGE}.norm2",
    "head.norm": "norm_out",
    "head.head": "proj_out",
    "head.modulation": "scale_shift_table",
}

_ATTENTIONS = {"self_attn": "attn1", "cross_attn": "attn2"}
_PROJECTIONS = {
    "q": "to_q",
    "k": "to_k",
    "v": "to_v",
    "o": "to_out.0",
    "k_img": "add_k_proj",
    "v_img": "add_v_proj",
    "norm_k_img": "norm_added_k",
}

# Within `blocks.N.`, and VACE's `vace_blocks.N.`, which alone have the two projections. The authors number
# norms by place of definition, diffusers by order of use.
_BLOCK = {
    "norm2": "norm3",
    "norm3": "norm2",
    "modulation": "scale_shift_table",
    "ffn.0": "ffn.net.0.proj",
    "ffn.2": "ffn.net.2",
    "before_proj": "proj_in",
    "after_proj": "proj_out",
    **_ATTENTIONS,
    **{
        f"{attention}.{projection}": f"{other_attention}.{other_projection}"
        for attention, other_attention in _ATTENTIONS.items()
        for projection, other_projection in _PROJECTIONS.items()
    },
}

_NATIVE_ONLY = re.compile(
    r"(audio_injector|music_injector)\..+"  # S2V's, WanToDance's
    r"|blocks\.\d+\.block\..+"  # Animate-2's
    r"|blocks\.\d+\.(attn\.(qkv|proj)|cross_attn\.(q_linear|kv_linear|proj)|ffn\.w[123])"  # LongCat-Video's
)
_WORDS = (*_TOP, *_BLOCK, "patch_embedding", "vace_blocks", "audio_injector", "music_injector")
_WORDS += ("injector_adain_layers", "injector_pre_norm_feat", "q_linear", "kv_linear")
NATIVE_WORDS = tuple(sorted({part for name in _WORDS for part in name.split(".") if "_" in part}))
"""Parts of native names with an underscore of their own, which kohya's LoRA files run into the others."""


def _inverse(table: Mapping[str, str]) -> dict[str, str]:
    inverse = {right: left for left, right in table.items()}
    assert len(inverse) == len(table), "a table that cannot be inverted"
    return inverse


_TOP_INVERSE = _inverse(_TOP)
_BLOCK_INVERSE = _inverse(_BLOCK)

_BLOCK_NAME = re.compile(r"((?:vace_)?blocks\.\d+\.)(.+)")
_PREFIXES = ("model.diffusion_model.", "diffusion_model.")


def from_native(name: str) -> str:
    """Turn the authors' name of a module or parameter into diffusers'.

    >>> from_native("blocks.0.self_attn.q.weight")
    'blocks.0.attn1.to_q.weight'
    """
    return _rename(name, _TOP, _BLOCK)


def to_native(name: str) -> str:
    """Turn diffusers' name of a module or parameter into the authors'; the inverse of `from_native`."""
    return _rename(name, _TOP_INVERSE, _BLOCK_INVERSE)


def is_native_only(name: str) -> bool:
    """Tell whether the authors' name of a layer is one of a variant that diffusers has no names for."""
    return _NATIVE_ONLY.fullmatch(name) is not None


def parameter_name(layout: Layout, key: str) -> str | None:
    """Turn a key of a transformer file into the parameter's name; None for keys that mean nothing.

    Single files come with or without a prefix and in either spelling: those keys are told apart one by one.
    """
    if ".norm_added_q." in key:  # old diffusers files: a norm that no layer uses
        return None
    if layout == "diffusers":
        return key
    if layout == "native":
        return from_native(key)
    bare = strip_prefix(key)
    return bare if _is_diffusers_key(bare) else from_native(bare)


def strip_prefix(key: str) -> str:
    """Remove what ComfyUI's files put before a transformer's keys."""
    for prefix in _PREFIXES:
        key = key.removeprefix(prefix)
    return key


def is_native_key(key: str) -> bool:
    """Tell whether a parameter's key is spelled as in the authors' code, and differently from diffusers."""
    return not _is_diffusers_key(key) and from_native(key) != key


def _is_diffusers_key(key: str) -> bool:
    # Of the two swapped norms only one has parameters: `norm3` natively, `norm2` in diffusers.
    block = _BLOCK_NAME.fullmatch(key)
    if block:
        rest = block[2]
        return rest.startswith("norm2.") or (not rest.startswith("norm3.") and _is_in(rest, _BLOCK_INVERSE))
    return _is_in(key, _TOP_INVERSE)


def _is_in(name: str, table: Mapping[str, str]) -> bool:
    return _rename_prefix(name, table) != name


def _rename(name: str, top: Mapping[str, str], block: Mapping[str, str]) -> str:
    match = _BLOCK_NAME.fullmatch(name)
    return match[1] + _rename_prefix(match[2], block) if match else _rename_prefix(name, top)


def _rename_prefix(name: str, table: Mapping[str, str]) -> str:
    """Replace the longest run of leading parts that the table knows."""
    parts = name.split(".")
    for count in range(len(parts), 0, -1):
        head = ".".join(parts[:count])
        if head in table:
            return ".".join([table[head], *parts[count:]])
    return name
