"""Keys in FLUX.2's transformer files, and the parameters that they hold; layers are named in `lora_names`."""

from __future__ import annotations

import re

from tworeel.models.family import Layout
from tworeel.models.flux2.lora_names import SWAPPED, native_parts
from tworeel.weights.rows import Names, Rows

_NORMS = {
    "double_blocks": {
        "img_attn.norm.query_norm": "attn.norm_q",
        "img_attn.norm.key_norm": "attn.norm_k",
        "txt_attn.norm.query_norm": "attn.norm_added_q",
        "txt_attn.norm.key_norm": "attn.norm_added_k",
    },
    "single_blocks": {"norm.query_norm": "attn.norm_q", "norm.key_norm": "attn.norm_k"},
}
"""By the authors' list of blocks."""
_LISTS = {"double_blocks": "transformer_blocks", "single_blocks": "single_transformer_blocks"}
_NORM = re.compile(r"(double_blocks|single_blocks)\.(\d+)\.(.*norm)")
_PREFIXES = ("model.diffusion_model.", "diffusion_model.")


def parameter_name(layout: Layout, key: str) -> Names:
    """Turn a key of a transformer file into the parameters that its rows are.

    Single files come with or without a prefix and in either spelling: those keys are told apart one by one.
    """
    if layout == "diffusers":
        return key
    module, _, leaf = strip_prefix(key).rpartition(".")
    parts = native_parts(module)
    if len(parts) > 1:
        return tuple(Rows(f"{part}.{leaf}", (i,), of=len(parts)) for i, part in enumerate(parts))
    if not parts:
        # The authors call the weight of a norm its scale.
        return f"{_norm(module)}.{'weight' if leaf == 'scale' else leaf}"
    name = f"{parts[0]}.{leaf}"
    return (Rows(name, (1, 0), of=2),) if parts[0] in SWAPPED else name


def strip_prefix(key: str) -> str:
    """Remove what ComfyUI's files put before a transformer's keys."""
    for prefix in _PREFIXES:
        key = key.removeprefix(prefix)
    return key


def native_norm(name: str) -> str:
    """Turn diffusers' name of a norm into the authors'; other names stay as they are."""
    for theirs, ours in _LISTS.items():
        stem, _, rest = name.partition(".")
        index, _, part = rest.partition(".")
        norms = {own: native for native, own in _NORMS[theirs].items()}
        if stem == ours and part in norms:
            return f"{theirs}.{index}.{norms[part]}"
    return name


def _norm(module: str) -> str:
    match = _NORM.fullmatch(module)
    if match is None or match[3] not in _NORMS[match[1]]:
        return module
    return f"{_LISTS[match[1]]}.{match[2]}.{_NORMS[match[1]][match[3]]}"
