"""How FLUX.2's transformer is trained: what it sees and what it must predict.

Shape letters: C latent channels (of 2×2 patches), H/W patches of an image, L tokens, D text width.

Flow matching (https://arxiv.org/abs/2210.02747): x_t = (1 - sigma) x_0 + sigma noise, target noise - x_0.
Tokens have four coordinates (t, h, w, l): patches of the image (0, h, w, 0), of reference image i
(10 + 10 i, h, w, 0), words of the caption (0, 0, 0, l). References follow the image and stay clean.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from tworeel.models.family import ModelSource, TrainingSample, Traits

TEXT_TOKENS = 512
"""Captions are padded to this length; there is no mask."""
PATCH = 16
"""Pixels of a token's side: 8 of the VAE, and 2 latent pixels."""
REFERENCE_STEP = 10
"""Distance of reference images on the axis t."""
GUIDANCE = 1.0
"""Of dev in training: the scale at which guidance changes nothing."""
REFERENCE = "reference_latents"


def cached_shapes(
    source: ModelSource, frames: int, height: int, width: int, references: Sequence[tuple[int, int]] = ()
) -> dict[str, tuple[int, ...]]:
    """Return the shapes of what `make_sample` is given for an image of this size in pixels, by name."""
    config = source.transformer.config
    shapes: dict[str, tuple[int, ...]] = {
        "latents": (config["in_channels"], frames, height // PATCH, width // PATCH),
        "text": (TEXT_TOKENS, config["joint_attention_dim"]),
    }
    for i, (high, wide) in enumerate(references):
        shapes[f"{REFERENCE}_{i}"] = (config["in_channels"], 1, high // PATCH, wide // PATCH)
    return shapes


def make_sample(
    traits: Traits,
    cached: Mapping[str, Tensor],
    noise: Tensor,
    sigma: float,
    *,
    dtype: torch.dtype,
    condition_on_image: bool = True,
) -> TrainingSample:
    """Noise one cached image and put it into the form that the transformer takes.

    Args:
        traits: which variant it is.
        cached: what the encoders returned: `latents` (C, 1, H, W), `text` (512, D) and, of each reference
            image, `reference_latents_0` (C, 1, H, W), …
        noise: fp32, (C, 1, H, W).
        sigma: noise level in (0, 1], which is the timestep here.
        dtype: precision of the transformer's inputs; the target stays fp32.
        condition_on_image: whether reference images are shown.
    """
    latents = cached["latents"].float()
    images = [torch.lerp(latents, noise, sigma)]
    images += references_of(cached) if condition_on_image else []
    inputs: dict[str, Any] = {
        "hidden_states": torch.cat([pack(image) for image in images])[None].to(dtype),
        "encoder_hidden_states": cached["text"][None].to(dtype),
        "timestep": torch.tensor([sigma], dtype=torch.float32),
        "img_ids": torch.cat([image_ids(image, REFERENCE_STEP * i) for i, image in enumerate(images)])[None],
        "txt_ids": text_ids(cached["text"].shape[0])[None],
        "guidance": torch.tensor([GUIDANCE]) if traits.variant == "flux2-dev" else None,
    }
    return TrainingSample(inputs=inputs, target=pack(noise - latents)[None])


def references_of(cached: Mapping[str, Tensor]) -> list[Tensor]:
    """Return the reference images' latents in their order."""
    count = sum(name.startswith(f"{REFERENCE}_") for name in cached)
    return [cached[f"{REFERENCE}_{i}"].float() for i in range(count)]


def pack(latents: Tensor) -> Tensor:
    """(C, 1, H, W) -> tokens (H·W, C), row by row."""
    return latents.flatten(1).T


def image_ids(latents: Tensor, t: int) -> Tensor:
    """Coordinates of an image's tokens, (H·W, 4)."""
    height, width = latents.shape[-2:]
    return torch.cartesian_prod(
        torch.tensor([t]), torch.arange(height), torch.arange(width), torch.tensor([0])
    )


def text_ids(length: int) -> Tensor:
    """Coordinates of the caption's tokens, (L, 4)."""
    return torch.nn.functional.pad(torch.arange(length)[:, None], (3, 0))
