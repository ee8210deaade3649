"""FLUX.2-dev and FLUX.2-klein as Tworeel sees them."""

from __future__ import annotations

from importlib import import_module
from types import ModuleType

import torch

from tworeel.models.family import Family, ModelSource, TextEncoder
from tworeel.models.flux2.conditioning import cached_shapes, make_sample
from tworeel.models.flux2.encoders import latent_identity, open_latent_encoder
from tworeel.models.flux2.keys import NATIVE_WORDS, from_native, parameter_name, to_native
from tworeel.models.flux2.layouts import locate
from tworeel.models.flux2.transformer import BLOCK_LISTS, KEEP_FP32, LORA_PRESETS, build_transformer


def open_text_encoder(source: ModelSource, device: torch.device, dtype: torch.dtype) -> TextEncoder:
    """Load the text encoder and its tokenizer; see `tworeel.models.flux2.text`."""
    encoder: TextEncoder = _text().open_text_encoder(source, device, dtype)
    return encoder


def text_identity(source: ModelSource) -> str:
    """Hash what decides the embedding of a caption; see `tworeel.models.flux2.text`."""
    found: str = _text().text_identity(source)
    return found


def _text() -> ModuleType:
    # Its libraries take seconds to import, and most commands embed no caption.
    return import_module("tworeel.models.flux2.text")


FLUX2 = Family(
    name="flux2",
    block_lists=BLOCK_LISTS,
    keep_fp32=KEEP_FP32,
    lora_presets=LORA_PRESETS,
    locate=locate,
    build_transformer=build_transformer,
    parameter_name=parameter_name,
    to_native=to_native,
    from_native=from_native,
    native_words=NATIVE_WORDS,
    latent_identity=latent_identity,
    text_identity=text_identity,
    open_latent_encoder=open_latent_encoder,
    open_text_encoder=open_text_encoder,
    cached_shapes=cached_shapes,
    make_sample=make_sample,
)
