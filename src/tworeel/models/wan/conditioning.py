"""How Wan's transformers are trained: what they see and what they must predict.

Shape letters: B batch (1), C latent channels, F latent frames, H/W latent height and width, L text tokens,
D text width.

Flow matching (https://arxiv.org/abs/2210.02747): x_t = (1 - sigma) x_0 + sigma noise, target noise - x_0.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from tworeel.models.family import ModelSource, TrainingSample, Traits

TEXT_TOKENS = 512
"""Captions are padded to this length with zeros; there is no mask in cross-attention."""
PATCH = 2
"""Latent pixels of a token's side."""
IMAGE_TOKENS = 257
"""What CLIP ViT-H makes of an image."""


def cached_shapes(
    source: ModelSource, frames: int, height: int, width: int, references: Sequence[tuple[int, int]] = ()
) -> dict[str, tuple[int, ...]]:
    """Return the shapes of what `make_sample` is given for a clip of this size in pixels, by name."""
    traits, config = source.traits, source.transformer.config
    stride = traits.spatial_multiple // PATCH
    size = ((frames - 1) // traits.temporal_stride + 1, height // stride, width // stride)
    shapes: dict[str, tuple[int, ...]] = {
        "latents": (config["out_channels"], *size),
        "text": (TEXT_TOKENS, config["text_dim"]),
    }
    if traits.needs_image:
        shapes["image_latents"] = shapes["latents"]
        images = len(traits.image_inputs)
        if width_of_images := config.get("image_dim"):
            tokens = config.get("pos_embed_seq_len") or IMAGE_TOKENS * images
            shapes["image_embeds"] = (tokens, width_of_images)
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
    """Noise one cached clip and put it into the form that the variant's transformer takes.

    Args:
        traits: which variant it is.
        cached: what the encoders returned: `latents` (C, F, H, W) and `text` (L, D), and with an image
            `image_latents` (16, F, H, W), `image_embeds` (tokens, width) or `first_latent` (C, 1, H, W).
        noise: fp32, (C, F, H, W).
        sigma: noise level in (0, 1]; the timestep is 1000 sigma, in fp32.
        dtype: precision of the transformer's inputs; the target stays fp32.
        condition_on_image: for TI2V-5B, whose image is optional: keep the first frame clean.
    """
    latents = cached["latents"].float()
    noisy = torch.lerp(latents, noise, sigma)
    timestep = torch.tensor([1000.0 * sigma], dtype=torch.float32)
    inputs: dict[str, Any] = {"encoder_hidden_states": padded(cached["text"])[None].to(dtype)}
    loss_mask = None
    if "image_latents" in cached:
        noisy = torch.cat([noisy, _image_channels(traits, cached["image_latents"].float())])
    elif traits.image_optional and condition_on_image and latents.shape[1] > 1:
        first = cached["first_latent"].float() if "first_latent" in cached else latents[:, :1]
        noisy, timestep, loss_mask = _clean_first_frame(noisy, first, timestep)
    if "image_embeds" in cached:
        inputs["encoder_hidden_states_image"] = one_an_image(traits, cached["image_embeds"]).to(dtype)
    inputs |= {"hidden_states": noisy[None].to(dtype), "timestep": timestep}
    return TrainingSample(inputs=inputs, target=(noise - latents)[None], loss_mask=loss_mask)


def padded(text: Tensor) -> Tensor:
    """Fill a caption's embedding, (L, D), up with zeros."""
    return torch.nn.functional.pad(text, (0, 0, 0, TEXT_TOKENS - text.shape[0]))


def _image_channels(traits: Traits, image_latents: Tensor) -> Tensor:
    """20 channels beside the noisy ones: a mask of the frames that are given, and the given latents.

    The mask has a channel for each of the four frames in a latent frame. The first latent frame stands for
    one frame that is repeated four times; of the last one only the last frame is given (FLF2V).
    """
    mask = torch.zeros(traits.temporal_stride, *image_latents.shape[1:])
    mask[:, 0] = 1
    if "last_image" in traits.image_inputs:
        mask[-1, -1] = 1
    return torch.cat([mask, image_latents])


def _clean_first_frame(noisy: Tensor, first: Tensor, timestep: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """TI2V-5B: the first latent frame is given, its tokens have timestep 0, and it has no loss."""
    _, frames, height, width = noisy.shape
    loss_mask = torch.ones(1, 1, frames, 1, 1)
    loss_mask[:, :, 0] = 0
    per_frame = height * width // PATCH**2
    timesteps = timestep.repeat(frames * per_frame)
    timesteps[:per_frame] = 0
    return torch.cat([first, noisy[:, 1:]], dim=1), timesteps[None], loss_mask


def one_an_image(traits: Traits, embeds: Tensor) -> Tensor:
    """One batch entry an image: diffusers joins the entries of FLF2V's two images itself."""
    return embeds.unflatten(0, (len(traits.image_inputs), -1))
