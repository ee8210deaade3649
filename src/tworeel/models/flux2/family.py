"""FLUX.2-dev and FLUX.2-klein as Tworeel sees them."""

from __future__ import annotations

from tworeel.models.family import Family
from tworeel.models.flux2.conditioning import cached_shapes, make_sample
from tworeel.models.flux2.encoders import latent_identity, open_latent_encoder
from tworeel.models.flux2.keys import parameter_name
from tworeel.models.flux2.layouts import locate
from tworeel.models.flux2.lora_names import (
    NATIVE_WORDS,
    OWN_WORDS,
    SWAPPED,
    from_native,
    native_parts,
    to_native,
)
from tworeel.models.flux2.sampling import SAMPLING
from tworeel.models.flux2.text import open_text_encoder, text_identity
from tworeel.models.flux2.text_placement import text_workers
from tworeel.models.flux2.transformer import BLOCK_LISTS, KEEP_FP32, LORA_PRESETS, build_transformer

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
    own_words=OWN_WORDS,
    native_parts=native_parts,
    native_swapped=SWAPPED,
    diffsynth_names="diffusers",
    latent_identity=latent_identity,
    text_identity=text_identity,
    open_latent_encoder=open_latent_encoder,
    open_text_encoder=open_text_encoder,
    text_workers=text_workers,
    cached_shapes=cached_shapes,
    make_sample=make_sample,
    sampling=SAMPLING,
)
