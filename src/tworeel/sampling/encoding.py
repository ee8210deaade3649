"""Prompts and condition images as the encoders see them; the encoders are gone before a transformer comes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from tworeel.cache.build import embed_captions
from tworeel.cache.store import CacheStore
from tworeel.data.clips import Bucket
from tworeel.data.images import read_image
from tworeel.data.pixels import fit
from tworeel.data.references import fit_references, load_reference
from tworeel.engine.releasing import release_memory
from tworeel.models.family import Family, ModelSource, Picture, TextOptions, Traits
from tworeel.sampling.request import REFERENCE, SampleRequest
from tworeel.workers import Observer


def encode_request(
    store: CacheStore,
    family: Family,
    source: ModelSource,
    request: SampleRequest,
    *,
    devices: Sequence[torch.device],
    dtype: torch.dtype,
    text: TextOptions,
    observer: Observer,
) -> list[Picture]:
    """Return a picture for each prompt.

    Args:
        store: the cache, which embeddings of prompts come from and go to.
        devices: that encode.
        dtype: that the encoders compute in.
        text: where the text encoder runs, and in which precision.
    """
    texts = embed_captions(
        store, family, source, request.captions, devices=devices, dtype=dtype, text=text, observer=observer
    )
    images = _encode_images(family, source, request, devices[0], dtype)
    return [
        Picture(
            text=texts[prompt],
            negative=texts[request.negative_prompt] if request.has_negative else None,
            images=images,
            width=request.width,
            height=request.height,
            frames=request.frames,
            steps=request.steps,
            guidance=request.guidance,
        )
        for prompt in request.prompts
    ]


def _encode_images(
    family: Family, source: ModelSource, request: SampleRequest, device: torch.device, dtype: torch.dtype
) -> dict[str, Tensor]:
    if not request.images:
        return {}
    images = {name: _pixels(name, path, request, source.traits) for name, path in request.images.items()}
    first = torch.zeros(3, request.height, request.width, dtype=torch.uint8)
    first = images.get("first_image", first)
    # The encoders are those of training clips; of this one only what its images give is used.
    clip = first[:, None].expand(-1, request.frames, -1, -1)
    encoder = family.open_latent_encoder(source, device, dtype)
    encoded = encoder.encode(clip, images)
    del encoder
    release_memory()
    return {name: tensor for name, tensor in encoded.items() if name != "latents"}


def _pixels(name: str, path: Path, request: SampleRequest, traits: Traits) -> Tensor:
    if name == REFERENCE:
        (reference,) = fit_references([path], traits, [])  # it was checked with the request
        return load_reference(reference)
    bucket = Bucket(frames=1, height=request.height, width=request.width)
    return torch.from_numpy(fit(read_image(path), bucket)).permute(2, 0, 1).contiguous()
