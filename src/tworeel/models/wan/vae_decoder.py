"""The Wan VAE's decoder: normalized latents to pixels, one latent frame at a time.

Shape letters: C latent channels, F latent frames, H/W latent height and width; pixel frames are 4F-3.
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers.models.autoencoders.autoencoder_kl_wan import AutoencoderKLWan, WanCausalConv3d, unpatchify
from torch import Tensor

from tworeel.models.family import ModelSource, Picture
from tworeel.models.wan.vae import load_vae, statistics


class WanDecoder:
    """Decodes what the pipelines return as latents.

    Memory on the device does not grow with the number of frames: the decoder sees one latent frame at a time
    and remembers the last two inputs of each causal convolution.
    """

    def __init__(self, network: AutoencoderKLWan, device: torch.device, dtype: torch.dtype) -> None:
        self._network = network
        self._device = device
        self._dtype = dtype
        self._mean, self._std = statistics(network.config, device)

    @torch.no_grad()
    def decode(self, latents: Tensor, picture: Picture) -> Tensor:
        """Decode (1, C, F, H, W) to uint8 (4F-3, height, width, 3) on the CPU."""
        decoder = self._network.decoder
        remembered = [None] * sum(isinstance(module, WanCausalConv3d) for module in decoder.modules())
        parts = [
            self._decode(frame, remembered, is_first=number == 0)
            for number, frame in enumerate(latents[0].split(1, dim=1))
        ]
        return torch.cat(parts)

    def _decode(self, latents: Tensor, remembered: list[Any], *, is_first: bool) -> Tensor:
        scaled = latents.to(self._device).float() * self._std + self._mean
        hidden = self._network.post_quant_conv(scaled[None].to(self._dtype))
        pixels = self._network.decoder(hidden, feat_cache=remembered, feat_idx=[0], first_chunk=is_first)
        pixels = unpatchify(pixels, self._network.config["patch_size"] or 1)[0].float()
        levels = ((pixels.clamp(-1, 1) + 1) * 127.5).round()
        return levels.to(torch.uint8).permute(1, 2, 3, 0).cpu()


def open_decoder(source: ModelSource, device: torch.device, dtype: torch.dtype) -> WanDecoder:
    """Load the decoding half of the VAE.

    Raises:
        UserError: a file is damaged or holds another network.
    """
    assert source.vae is not None, "locate reports a missing VAE"
    return WanDecoder(load_vae(source.vae, "decoder", device, dtype), device, dtype)
