"""CLIP features of condition images, for Wan 2.1 I2V and FLF2V.

Shape letters: L tokens (257 for the real encoder), D width (1280).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import CLIPVisionConfig, CLIPVisionModel

from tworeel.errors import UserError
from tworeel.models.family import Component
from tworeel.models.wan.image_keys import OpenClipFiles, is_open_clip, plain_parameter_name
from tworeel.weights.loading import load_weights
from tworeel.weights.tensor_files import TensorFiles, TensorInfo

_HEAD_WIDTH = 80  # ViT-H/14: 1280 channels, 16 heads
_MEAN = (0.48145466, 0.4578275, 0.40821073)  # statistics of CLIP's training images
_STD = (0.26862954, 0.26130258, 0.27577711)


class WanImageEncoder:
    """Gives the features of CLIP's last but one layer, which Wan's image cross-attention reads."""

    def __init__(self, model: CLIPVisionModel) -> None:
        self._model = model

    @torch.no_grad()
    def encode(self, image: Tensor) -> Tensor:
        """Encode uint8 (3, height, width) to (L, D) on the CPU, in the encoder's dtype."""
        weight = self._model.embeddings.patch_embedding.weight
        size = math.isqrt(self._model.embeddings.num_patches) * weight.shape[-1]
        pixels = clip_pixels(image.to(weight.device), size)
        features = self._model(pixels[None].to(weight.dtype), output_hidden_states=True)
        return features.hidden_states[-2][0].cpu()


def clip_pixels(image: Tensor, size: int) -> Tensor:
    """Resize uint8 (3, height, width) to a square and normalize; returns fp32 (3, size, size).

    The whole image is squeezed into the square, as Wan's own code does: nothing is cropped away.
    """
    resized = F.interpolate(image[None].float(), (size, size), mode="bicubic", antialias=True)[0]
    mean, std = (torch.tensor(v, device=image.device).view(3, 1, 1) for v in (_MEAN, _STD))
    return (resized.clamp(0, 255) / 255 - mean) / std


def open_image_encoder(component: Component, device: torch.device, dtype: torch.dtype) -> WanImageEncoder:
    """Load the CLIP image encoder from any layout; the text half of Wan's own file is not read.

    Raises:
        UserError: a file is damaged or holds another network.
    """
    files = TensorFiles(*component.files)
    if is_open_clip(files.names):
        files = OpenClipFiles(*component.files)
    model = build_image_model(image_config(component, files.names))
    load_weights(
        model, files, plain_parameter_name, device_of=lambda name: device, dtype_of=lambda name: dtype
    )
    return WanImageEncoder(model.eval())


def build_image_model(config: Mapping[str, Any]) -> CLIPVisionModel:
    """Make the encoder on the meta device; its table of positions, which no file holds, is real."""
    with torch.device("meta"):
        model = CLIPVisionModel(CLIPVisionConfig.from_dict(dict(config)))
    positions = torch.arange(model.embeddings.num_positions)[None]
    model.embeddings.register_buffer("position_ids", positions, persistent=False)
    return model


def image_config(component: Component, names: Mapping[str, TensorInfo]) -> dict[str, Any]:
    """Return `CLIPVisionConfig`'s arguments: the folder's config.json, or what the shapes tell."""
    if component.config:
        return dict(component.config)
    shapes = {plain_parameter_name(key): info.shape for key, info in names.items()}
    try:
        width, _, patch, _ = shapes["embeddings.patch_embedding.weight"]
        positions = shapes["embeddings.position_embedding.weight"][0]
        hidden = shapes["encoder.layers.0.mlp.fc1.weight"][0]
    except (KeyError, ValueError):
        raise UserError(
            f"{component.files[0]}: not a CLIP image encoder (its first layers are missing)"
        ) from None
    return {
        "hidden_size": width,
        "intermediate_size": hidden,
        "num_hidden_layers": _count_layers(shapes),
        "num_attention_heads": max(1, width // _HEAD_WIDTH),
        "image_size": patch * math.isqrt(positions - 1),
        "patch_size": patch,
        "hidden_act": "gelu",
    }


def _count_layers(names: Iterable[str | None]) -> int:
    return sum(str(name).endswith(".mlp.fc1.weight") for name in names)
