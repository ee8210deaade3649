"""The Wan VAE: loading either half, and its encoder: pixels to normalized latents, a few frames at a time.

Shape letters: C latent channels, F latent frames, H/W latent height and width; pixel frames are 4F-3.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, Literal

import torch
from diffusers.models.autoencoders.autoencoder_kl_wan import AutoencoderKLWan, WanCausalConv3d, patchify
from torch import Tensor

from tworeel.errors import UserError
from tworeel.models.family import Component
from tworeel.models.wan.vae_keys import vae_modules
from tworeel.weights.loading import load_weights
from tworeel.weights.tensor_files import TensorFiles, TensorInfo

TEMPORAL_STRIDE = 4
Half = Literal["encoder", "decoder"]
_PARTS: dict[Half, tuple[str, ...]] = {
    "encoder": ("encoder.", "quant_conv.", "conv1."),
    "decoder": ("decoder.", "post_quant_conv.", "conv2."),
}
"""Beginnings of the keys of each half, diffusers' and the authors'."""

# Statistics of the Wan 2.2 VAE's latents by channel, as published with Wan2.2-TI2V-5B; those of the
# Wan 2.1 VAE are the defaults of AutoencoderKLWan.
# fmt: off
_MEAN_48 = [
    -0.2289, -0.0052, -0.1323, -0.2339, -0.2799, 0.0174, 0.1838, 0.1557, -0.1382, 0.0542, 0.2813, 0.0891,
    0.1570, -0.0098, 0.0375, -0.1825, -0.2246, -0.1207, -0.0698, 0.5109, 0.2665, -0.2108, -0.2158, 0.2502,
    -0.2055, -0.0322, 0.1109, 0.1567, -0.0729, 0.0899, -0.2799, -0.1230, -0.0313, -0.1649, 0.0117, 0.0723,
    -0.2839, -0.2083, -0.0520, 0.3748, 0.0152, 0.1957, 0.1433, -0.2944, 0.3573, -0.0548, -0.1681, -0.0667,
]
_STD_48 = [
    0.4765, 1.0364, 0.4514, 1.1677, 0.5313, 0.4990, 0.4818, 0.5013, 0.8158, 1.0344, 0.5894, 1.0901,
    0.6885, 0.6165, 0.8454, 0.4978, 0.5759, 0.3523, 0.7135, 0.6804, 0.5833, 1.4146, 0.8986, 0.5659,
    0.7069, 0.5338, 0.4889, 0.4917, 0.4069, 0.4999, 0.6866, 0.4093, 0.5709, 0.6065, 0.6415, 0.4944,
    0.5726, 1.2042, 0.5458, 1.6887, 0.3971, 1.0600, 0.3943, 0.5537, 0.5444, 0.4089, 0.7468, 0.7744,
]
# fmt: on
LATENT_STATISTICS_48 = {"latents_mean": _MEAN_48, "latents_std": _STD_48}


class WanVae:
    """Encodes to the posterior's mean, normalized: (mu - latents_mean) / latents_std.

    Memory on the device does not grow with the number of frames: the encoder sees the first frame, then
    four frames at a time, and remembers the last two inputs of each causal convolution.
    """

    def __init__(self, network: AutoencoderKLWan, device: torch.device, dtype: torch.dtype) -> None:
        self._network = network
        self._device = device
        self._dtype = dtype
        self._mean, self._std = statistics(network.config, device)

    def encode_clip(self, clip: Tensor) -> Tensor:
        """Encode uint8 (3, 4F-3, height, width) to fp32 (C, F, H, W) on the CPU."""
        return self._encode(self._pixels(part) for part in _windows(clip))

    def encode_ends(self, first: Tensor, last: Tensor | None, frames: int) -> Tensor:
        """Encode a clip of which only its ends are known, the rest mid-grey.

        Args:
            first: uint8 (3, height, width).
            last: the same, or None if the last frame is not known either.
            frames: pixel frames of the clip, 4F-3.

        Returns:
            fp32 (C, F, H, W) on the CPU.
        """
        return self._encode(self._end_windows(first, last, frames))

    def _end_windows(self, first: Tensor, last: Tensor | None, frames: int) -> Iterator[Tensor]:
        yield self._pixels(first[:, None])
        for start in range(1, frames, TEMPORAL_STRIDE):
            window = torch.zeros(
                3, TEMPORAL_STRIDE, *first.shape[1:], device=self._device, dtype=self._dtype
            )  # zero in [-1, 1] is mid-grey
            if last is not None and start + TEMPORAL_STRIDE == frames:
                window[:, -1] = self._pixels(last)
            yield window

    def _pixels(self, frames: Tensor) -> Tensor:
        return (frames.to(self._device).float() / 127.5 - 1).to(self._dtype)

    @torch.no_grad()
    def _encode(self, windows: Iterable[Tensor]) -> Tensor:
        encoder = self._network.encoder
        patch = self._network.config["patch_size"] or 1
        remembered = [None] * sum(isinstance(module, WanCausalConv3d) for module in encoder.modules())
        parts = [
            encoder(patchify(window[None], patch), feat_cache=remembered, feat_idx=[0]) for window in windows
        ]
        moments = self._network.quant_conv(torch.cat(parts, dim=2))
        mean, _log_variance = moments[0].chunk(2)
        return ((mean.float() - self._mean) / self._std).cpu()


def open_vae(component: Component, device: torch.device, dtype: torch.dtype) -> WanVae:
    """Load the encoding half of a Wan VAE from any layout; the decoder's weights are not read.

    Raises:
        UserError: a file is damaged or holds another network.
    """
    return WanVae(load_vae(component, "encoder", device, dtype), device, dtype)


def load_vae(component: Component, half: Half, device: torch.device, dtype: torch.dtype) -> AutoencoderKLWan:
    """Load one half of a Wan VAE from any layout; the other half's weights are not read.

    Raises:
        UserError: a file is damaged or holds another network.
    """
    files = TensorFiles(*component.files)
    network = build_vae(vae_config(component, files.names), half)
    name_of = vae_parameter_name(files.names, half)
    load_weights(network, files, name_of, device_of=lambda name: device, dtype_of=lambda name: dtype)
    return network.eval()


def build_vae(config: Mapping[str, Any], half: Half) -> AutoencoderKLWan:
    """Make one half of the VAE on the meta device."""
    with torch.device("meta"):
        network = AutoencoderKLWan.from_config(dict(config))
    if half == "encoder":
        network.decoder = network.post_quant_conv = None
    else:
        network.encoder = network.quant_conv = None
    return network


def statistics(config: Mapping[str, Any], device: torch.device) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of the latents by channel, fp32, (C, 1, 1, 1)."""
    return _per_channel(config["latents_mean"], device), _per_channel(config["latents_std"], device)


def vae_parameter_name(names: Iterable[str], half: Half = "encoder") -> Callable[[str], str | None]:
    """Return the function from a VAE file's keys to `AutoencoderKLWan`'s parameters (None: the other half's).

    Args:
        names: all keys of the file; they tell whose names they are, and which VAE it is.
        half: that is wanted.
    """
    names = list(names)
    native = "encoder.conv1.weight" in names
    others = _PARTS["decoder" if half == "encoder" else "encoder"]
    modules = vae_modules(residual=any(".downsamples.0.downsamples." in name for name in names))

    def parameter_name(key: str) -> str | None:
        if key.startswith(others):
            return None
        module, _, leaf = key.rpartition(".")
        return f"{modules.get(module, module)}.{leaf}" if native else key

    return parameter_name


def vae_config(component: Component, names: Mapping[str, TensorInfo]) -> dict[str, Any]:
    """Return `AutoencoderKLWan`'s arguments: the folder's config.json, or what the shapes tell."""
    if component.config:
        return dict(component.config)
    name_of = vae_parameter_name(names)
    shapes = {name_of(key): info.shape for key, info in names.items()}
    first, last = shapes.get("encoder.conv_in.weight"), shapes.get("quant_conv.weight")
    if first is None or last is None:
        raise UserError(
            f"{component.files[0]}: not a Wan VAE (no 'encoder.conv1.weight' or no 'conv1.weight')"
        )
    return _config_from_shapes(first, last, residual="encoder.down_blocks.0.resnets.0.conv1.weight" in shapes)


def _config_from_shapes(first: tuple[int, ...], last: tuple[int, ...], residual: bool) -> dict[str, Any]:
    """Derive the config from the first convolution (D, 3·patch², 3, 3, 3) and the last (2C, 2C, 1, 1, 1)."""
    channels, patch = last[0] // 2, math.isqrt(first[1] // 3)
    config = {
        "base_dim": first[0],
        "z_dim": channels,
        "in_channels": first[1],
        "out_channels": first[1],
        "is_residual": residual,
        "patch_size": patch if patch > 1 else None,
        "scale_factor_spatial": 8 * patch,
    }
    return config | (LATENT_STATISTICS_48 if channels == 48 else {})


def _windows(clip: Tensor) -> Iterator[Tensor]:
    """Cut (3, 4F-3, height, width) into the first frame and groups of four."""
    yield clip[:, :1]
    yield from clip[:, 1:].split(TEMPORAL_STRIDE, dim=1) if clip.shape[1] > 1 else ()


def _per_channel(values: Iterable[float], device: torch.device) -> Tensor:
    return torch.tensor(list(values), dtype=torch.float32, device=device).view(-1, 1, 1, 1)
