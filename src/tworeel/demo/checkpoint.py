"""A whole tiny Wan checkpoint: transformer, VAE, text encoder, tokenizer and, where needed, CLIP."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tworeel.demo.tiny_encoders import write_image_encoder, write_text_encoder, write_tokenizer, write_vae
from tworeel.demo.tiny_transformer import write_transformer
from tworeel.models.family import Layout

_WITH_CLIP = {"wan2.1-i2v-14b", "wan2.1-flf2v-14b"}


def write_checkpoint(
    folder: Path, *, variant: str, layout: Layout = "native", seed: int = 0, **transformer: Any
) -> Path:
    """Write a tiny checkpoint with the variant's true structure, file names and key names, random weights.

    Args:
        folder: of the model.
        variant: a name of `tworeel.models.wan.variants`.
        layout: how keys, files and folders are named; the values are the same in each.
        seed: of all values.
        transformer: further options of `write_transformer`.

    Returns:
        What `model.path` has to be: the folder, or ComfyUI's single file.
    """
    path = write_transformer(folder, variant=variant, layout=layout, seed=seed, **transformer)
    write_vae(folder, layout, z=48 if variant == "wan2.2-ti2v-5b" else 16, seed=seed)
    write_text_encoder(folder, layout, seed=seed)
    write_tokenizer(folder, layout)
    if variant in _WITH_CLIP:
        write_image_encoder(folder, layout, seed=seed)
    return path
