"""What a FLUX.2 model's VAE makes of an image and its reference images."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from tworeel.models.family import ModelSource
from tworeel.models.flux2.conditioning import REFERENCE
from tworeel.models.flux2.vae import Flux2Vae, open_vae
from tworeel.models.identity import digest, identity

# Raise this when the encoder returns something else for the same files.
LATENT_FORMAT = "flux2-latents-1"
_IMAGE = "reference_image"


class Flux2LatentEncoder:
    """Encodes images and their reference images."""

    def __init__(self, vae: Flux2Vae) -> None:
        self._vae = vae

    def encode(self, clip: Tensor, images: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Encode one image; see `LatentEncoder.encode`.

        Returns:
            `latents`: fp32 (C, 1, H, W), and the same of each reference image: `reference_latents_0`, …
        """
        encoded = {"latents": self._vae.encode(clip[:, 0])[:, None]}
        for name, image in images.items():
            if name.startswith(f"{_IMAGE}_"):
                encoded[name.replace(_IMAGE, REFERENCE)] = self._vae.encode(image)[:, None]
        return encoded


def open_latent_encoder(source: ModelSource, device: torch.device, dtype: torch.dtype) -> Flux2LatentEncoder:
    """Load the VAE's encoder.

    Raises:
        UserError: a file is damaged or holds another network.
    """
    assert source.vae is not None, "locate reports a missing VAE"
    return Flux2LatentEncoder(open_vae(source.vae, device, dtype))


def latent_identity(source: ModelSource) -> str:
    """Hash what decides the encoding of an image: the VAE."""
    assert source.vae is not None, "locate reports a missing VAE"
    return digest(LATENT_FORMAT, identity(source.vae))
