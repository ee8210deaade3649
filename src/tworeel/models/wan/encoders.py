"""What a Wan model's encoders make of a clip and its caption, and how to tell two sets of encoders apart."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from tworeel.models.family import ModelSource, Traits
from tworeel.models.identity import digest, identity
from tworeel.models.wan.image import WanImageEncoder, open_image_encoder
from tworeel.models.wan.text import TOKENIZER_FILES, WanTextEncoder, embedded_sentencepiece, open_umt5
from tworeel.models.wan.vae import WanVae, open_vae

# Raise these when the encoders return something else for the same files.
LATENT_FORMAT = "wan-latents-1"
TEXT_FORMAT = "wan-text-1"


class WanLatentEncoder:
    """Encodes clips and condition images for one variant of Wan."""

    def __init__(self, vae: WanVae, image_encoder: WanImageEncoder | None, traits: Traits) -> None:
        self._vae = vae
        self._image_encoder = image_encoder
        self._traits = traits

    def encode(self, clip: Tensor, images: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Encode one clip; see `LatentEncoder.encode`.

        Returns:
            `latents`: fp32 (C, F, H, W). Beside it, by variant:
            `image_latents`: fp32 (C, F, H, W), the clip with only its given images known (I2V, FLF2V);
            `image_embeds`: (257, 1280) or, for two images, (514, 1280) (Wan 2.1 I2V, FLF2V);
            `first_latent`: fp32 (C, 1, H, W), where TI2V-5B is given a first image of its own.
        """
        encoded = {"latents": self._vae.encode_clip(clip)}
        if self._traits.image_optional:
            return encoded | self._given_first_image(images)
        if self._traits.image_inputs:
            return encoded | self._condition(clip, images)
        return encoded

    def _given_first_image(self, images: Mapping[str, Tensor]) -> dict[str, Tensor]:
        first = images.get("first_image")
        return {} if first is None else {"first_latent": self._vae.encode_clip(first[:, None])}

    def _condition(self, clip: Tensor, images: Mapping[str, Tensor]) -> dict[str, Tensor]:
        ends = {"first_image": clip[:, 0], "last_image": clip[:, -1]} | dict(images)
        known = [ends[name] for name in self._traits.image_inputs]
        last = known[1] if len(known) > 1 else None
        encoded = {"image_latents": self._vae.encode_ends(known[0], last, clip.shape[1])}
        if self._image_encoder is not None:
            encoded["image_embeds"] = torch.cat([self._image_encoder.encode(image) for image in known])
        return encoded


def open_latent_encoder(source: ModelSource, device: torch.device, dtype: torch.dtype) -> WanLatentEncoder:
    """Load the VAE's encoder and, where the variant has one, the image encoder.

    Raises:
        UserError: a file is damaged or holds another network.
    """
    assert source.vae is not None, "locate reports a missing VAE"
    clip = source.image_encoder
    image_encoder = None if clip is None else open_image_encoder(clip, device, dtype)
    return WanLatentEncoder(open_vae(source.vae, device, dtype), image_encoder, source.traits)


def open_text_encoder(source: ModelSource, device: torch.device, dtype: torch.dtype) -> WanTextEncoder:
    """Load the text encoder and its tokenizer.

    Raises:
        UserError: a file is damaged or holds another network.
    """
    assert source.text_encoder is not None, "locate reports a missing text encoder"
    assert source.tokenizer is not None, "locate reports a missing tokenizer"
    return open_umt5(source.text_encoder, source.tokenizer, device, dtype)


def latent_identity(source: ModelSource) -> str:
    """Hash what decides the encoding of a clip: the networks and the variant's condition images."""
    components = [component for component in (source.vae, source.image_encoder) if component]
    traits = source.traits
    return digest(
        LATENT_FORMAT, ",".join(traits.image_inputs), str(traits.image_optional), *map(identity, components)
    )


def text_identity(source: ModelSource) -> str:
    """Hash what decides the embedding of a caption: the text encoder and its tokenizer."""
    assert source.text_encoder is not None, "locate reports a missing text encoder"
    assert source.tokenizer is not None, "locate reports a missing tokenizer"
    return digest(TEXT_FORMAT, identity(source.text_encoder), *_tokenizer_digests(source.tokenizer))


def _tokenizer_digests(path: Path) -> Iterable[str]:
    if path.is_dir():
        contents = {name: path / name for name in TOKENIZER_FILES if (path / name).is_file()}
        return [f"{name} {hashlib.sha256(file.read_bytes()).hexdigest()}" for name, file in contents.items()]
    return [hashlib.sha256(embedded_sentencepiece(path)).hexdigest()]
