"""The decoder of FLUX.2's VAE: latents to pixels.

Shape letters: C latent channels (of patches), H/W patches; pixels are 16 H × 16 W.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pixel_shuffle

from tworeel.models.family import ModelSource, Picture
from tworeel.models.flux2.conditioning import PATCH
from tworeel.models.flux2.vae import load_vae, statistics


class Flux2Decoder:
    """Decodes what the pipelines return as latents: dev's are normalized tokens, klein's the VAE's own."""

    def __init__(self, network: Any, device: torch.device, dtype: torch.dtype) -> None:
        self._network = network
        self._device = device
        self._dtype = dtype
        self._mean, self._std = statistics(network)

    @torch.no_grad()
    def decode(self, latents: Tensor, picture: Picture) -> Tensor:
        """Decode (1, H·W, C) or (1, C/4, 2 H, 2 W) to uint8 (1, height, width, 3) on the CPU."""
        hidden = latents.to(self._device).float()
        if hidden.ndim == 3:
            patches = hidden[0].T.unflatten(1, (picture.height // PATCH, picture.width // PATCH))
            hidden = pixel_shuffle(patches * self._std + self._mean, self._network.config["patch_size"][0])
            hidden = hidden[None]
        hidden = hidden.to(self._dtype)
        if self._network.post_quant_conv is not None:
            hidden = self._network.post_quant_conv(hidden)
        pixels = self._network.decoder(hidden).float()
        levels = ((pixels.clamp(-1, 1) + 1) * 127.5).round()
        return levels.to(torch.uint8).permute(0, 2, 3, 1).cpu()


def open_decoder(source: ModelSource, device: torch.device, dtype: torch.dtype) -> Flux2Decoder:
    """Load the decoding half of the VAE.

    Raises:
        UserError: a file is damaged or holds another network.
    """
    assert source.vae is not None, "locate reports a missing VAE"
    return Flux2Decoder(load_vae(source.vae, "decoder", device, dtype), device, dtype)
