"""A whole tiny FLUX.2 checkpoint: transformer, VAE, text encoder and tokenizer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tworeel.demo.tiny_flux2 import write_transformer, write_vae
from tworeel.demo.tiny_flux2_encoders import TextKind, write_flux2_text_encoder, write_flux2_tokenizer
from tworeel.models.family import Layout


def write_flux2_checkpoint(
    folder: Path,
    *,
    variant: str = "flux2-klein-base-4b",
    layout: Layout = "diffusers",
    seed: int = 0,
    **transformer: Any,
) -> Path:
    """Write a tiny checkpoint with the variant's true structure, file names and key names, random weights.

    Args:
        folder: of the model.
        variant: a name of `tworeel.models.flux2.variants`.
        layout: how keys, files and folders are named; the values are the same in each.
        seed: of all values.
        transformer: further options of `write_transformer`.

    Returns:
        What `model.path` has to be: the folder or the single file.
    """
    kind: TextKind = "mistral3" if variant == "flux2-dev" else "qwen3"
    path = write_transformer(folder, variant=variant, layout=layout, seed=seed, **transformer)
    write_vae(folder, layout, seed=seed)
    write_flux2_text_encoder(folder, layout, kind, seed=seed)
    write_flux2_tokenizer(folder, kind)
    return path
