"""FLUX.2's VAE, one half at a time, and its encoder: pixels to normalized latents of 2×2 patches.

Shape letters: C latent channels (of patches), H/W patches; pixels are 16 H × 16 W.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from accelerate import init_empty_weights
from diffusers.models.autoencoders.autoencoder_kl_flux2 import AutoencoderKLFlux2
from torch import Tensor
from torch.nn.functional import pixel_unshuffle

from tworeel.errors import UserError
from tworeel.models.family import Component
from tworeel.models.flux2.vae_keys import from_native
from tworeel.weights.loading import load_weights
from tworeel.weights.tensor_files import RowRange, TensorFiles, TensorInfo

_CPU = torch.device("cpu")
Half = Literal["encoder", "decoder"]
_NOT_READ = {
    "encoder": ("decoder.", "post_quant_conv.", "bn.num_batches_tracked"),
    "decoder": ("encoder.", "quant_conv.", "bn.num_batches_tracked"),
}
_PREFIXES = ("first_stage_model.", "vae.")
_STAGE = re.compile(r"\bencoder\.down(?:_blocks)?\.(\d+)\.")
_BUFFERS = ("running_mean", "running_var")
_STATISTICS = tuple(f"bn.{name}" for name in _BUFFERS)


class Flux2Vae:
    """Encodes to the posterior's mode, in patches, normalized: (h - mean) / sqrt(var + eps)."""

    def __init__(self, network: AutoencoderKLFlux2, device: torch.device, dtype: torch.dtype) -> None:
        self._network = network
        self._device = device
        self._dtype = dtype
        self._patch = network.config["patch_size"][0]
        self._mean, self._std = statistics(network)

    @torch.no_grad()
    def encode(self, image: Tensor) -> Tensor:
        """Encode uint8 (3, height, width) to fp32 (C, H, W) on the CPU."""
        pixels = (image.to(self._device).float() / 127.5 - 1).to(self._dtype)
        hidden = self._network.encoder(pixels[None])
        moments = hidden if self._network.quant_conv is None else self._network.quant_conv(hidden)
        mode, _log_variance = moments[0].float().chunk(2)
        return ((pixel_unshuffle(mode, self._patch) - self._mean) / self._std).cpu()


class _Files(TensorFiles):
    """A VAE's files; the authors' 1×1 convolutions of attention are seen as the linear layers they are."""

    def __init__(self, *paths: Path | str) -> None:
        super().__init__(*paths)
        self.names = {
            name: TensorInfo(_flat(name, info.shape), info.dtype) for name, info in self.names.items()
        }

    def read(self, name: str, device: torch.device = _CPU, rows: Sequence[RowRange] | None = None) -> Tensor:
        """Read one tensor, or ranges of its rows, to a device."""
        tensor = super().read(name, device, rows)
        return tensor.reshape(_flat(name, tuple(tensor.shape)))


def _flat(name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    return shape[:2] if ".attn_1." in name and shape[2:] == (1, 1) else shape


def open_vae(component: Component, device: torch.device, dtype: torch.dtype) -> Flux2Vae:
    """Load the encoding half of a FLUX.2 VAE from any layout; the decoder's weights are not read.

    Raises:
        UserError: a file is damaged or holds another network.
    """
    return Flux2Vae(load_vae(component, "encoder", device, dtype), device, dtype)


def load_vae(component: Component, half: Half, device: torch.device, dtype: torch.dtype) -> Any:
    """Load one half of a FLUX.2 VAE (`AutoencoderKLFlux2`) from any layout, and the latents' statistics.

    Raises:
        UserError: a file is damaged or holds another network.
    """
    files = _Files(*component.files)
    network = build_vae(vae_config(component, files.names), half)
    load_weights(
        network,
        files,
        vae_parameter_name(files.names, half),
        device_of=lambda name: device,
        dtype_of=lambda name: torch.float32 if name in _STATISTICS else dtype,
    )
    return network.eval()


def build_vae(config: Mapping[str, Any], half: Half) -> Any:
    """Make one half of the VAE (`AutoencoderKLFlux2`) on the meta device."""
    with init_empty_weights(include_buffers=True):
        network: Any = AutoencoderKLFlux2.from_config(dict(config))
    if half == "encoder":
        network.decoder = network.post_quant_conv = None
    else:
        network.encoder = network.quant_conv = None
    network.bn.register_buffer("num_batches_tracked", None)
    return network


def statistics(network: Any) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of the latents by channel, fp32, (C, 1, 1)."""
    mean, variance = (network.bn.get_buffer(name).view(-1, 1, 1) for name in _BUFFERS)
    return mean, torch.sqrt(variance + network.config["batch_norm_eps"])


def read_statistics(component: Component) -> dict[str, Tensor]:
    """Read the batch norm's `running_mean` and `running_var` alone."""
    with _Files(*component.files) as files:
        name_of = vae_parameter_name(files.names)
        keys = {name_of(key): key for key in files.names}
        return {name: files.read(keys[f"bn.{name}"]).float() for name in _BUFFERS}


def vae_parameter_name(names: Iterable[str], half: Half = "encoder") -> Callable[[str], str | None]:
    """Return the function from a VAE file's keys to `AutoencoderKLFlux2`'s (None: the other half's).

    Args:
        names: all keys of the file; they tell how many resolutions there are.
        half: that is wanted.
    """
    stages = 1 + max((int(found[1]) for name in names if (found := _STAGE.search(name))), default=0)

    def parameter_name(key: str) -> str | None:
        for prefix in _PREFIXES:
            key = key.removeprefix(prefix)
        name = from_native(key, stages)
        return None if name.startswith(_NOT_READ[half]) else name

    return parameter_name


def vae_config(component: Component, names: Mapping[str, TensorInfo]) -> dict[str, Any]:
    """Return `AutoencoderKLFlux2`'s arguments: the folder's config.json, or what the shapes tell."""
    if component.config:
        return dict(component.config)
    name_of = vae_parameter_name(names)
    shapes = {name_of(key): info.shape for key, info in names.items()}
    last, statistics = shapes.get("encoder.conv_out.weight"), shapes.get("bn.running_mean")
    widths = _widths(shapes)
    if last is None or statistics is None or not widths:
        raise UserError(
            f"{component.files[0]}: not a FLUX.2 VAE (its encoder or 'bn.running_mean' is missing)"
        )
    patch = round((statistics[0] * 2 / last[0]) ** 0.5)
    return {
        "block_out_channels": widths,
        "down_block_types": ["DownEncoderBlock2D"] * len(widths),
        "up_block_types": ["UpDecoderBlock2D"] * len(widths),
        "layers_per_block": 1 + _last_index(shapes, "encoder.down_blocks.0.resnets."),
        "latent_channels": last[0] // 2,
        "norm_num_groups": min(32, widths[0]),
        "use_quant_conv": "quant_conv.weight" in shapes,
        "patch_size": [patch, patch],
    }


def _widths(shapes: Mapping[str | None, tuple[int, ...]]) -> list[int]:
    """Return the channels of each stage."""
    stages = 1 + _last_index(shapes, "encoder.down_blocks.")
    named = [shapes.get(f"encoder.down_blocks.{i}.resnets.0.conv1.weight") for i in range(stages)]
    return [shape[0] for shape in named if shape is not None]


def _last_index(shapes: Mapping[str | None, tuple[int, ...]], prefix: str) -> int:
    found = [name.removeprefix(prefix) for name in shapes if name is not None and name.startswith(prefix)]
    return max((int(rest.split(".")[0]) for rest in found), default=-1)
