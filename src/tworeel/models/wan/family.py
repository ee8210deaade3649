"""Wan 2.1 and 2.2 as Tworeel sees them."""

from __future__ import annotations

from tworeel.models.family import Family
from tworeel.models.wan.conditioning import cached_shapes, make_sample
from tworeel.models.wan.encoders import (
    latent_identity,
    open_latent_encoder,
    open_text_encoder,
    text_identity,
)
from tworeel.models.wan.keys import NATIVE_WORDS, from_native, is_native_only, parameter_name, to_native
from tworeel.models.wan.layouts import locate
from tworeel.models.wan.sampling import SAMPLING
from tworeel.models.wan.transformer import BLOCK_LISTS, KEEP_FP32, LORA_PRESETS, build_transformer

WAN = Family(
    name="wan",
    block_lists=BLOCK_LISTS,
    keep_fp32=KEEP_FP32,
    lora_presets=LORA_PRESETS,
    locate=locate,
    build_transformer=build_transformer,
    parameter_name=parameter_name,
    to_native=to_native,
    from_native=from_native,
    native_words=NATIVE_WORDS,
    native_only=is_native_only,
    latent_identity=latent_identity,
    text_identity=text_identity,
    open_latent_encoder=open_latent_encoder,
    open_text_encoder=open_text_encoder,
    cached_shapes=cached_shapes,
    make_sample=make_sample,
    sampling=SAMPLING,
)
