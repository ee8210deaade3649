"""Wan's pipelines in diffusers, with what the encoders returned in the encoders' places."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import torch
from diffusers import AutoencoderKLWan, UniPCMultistepScheduler, WanImageToVideoPipeline, WanPipeline
from torch import Tensor, nn

from tworeel.models.family import ModelSource, Picture, Sampling, Traits
from tworeel.models.wan.conditioning import one_an_image, padded
from tworeel.models.wan.vae import statistics, vae_config
from tworeel.models.wan.vae_decoder import open_decoder
from tworeel.models.wan.variants import EXPERTS, takes_expert
from tworeel.weights.tensor_files import TensorFiles

BOUNDARY_RATIO = {"wan2.2-t2v-a14b": 0.875, "wan2.2-i2v-a14b": 0.9}
"""The high-noise expert's last timestep over 1000, as published with diffusers' checkpoints."""


def experts(traits: Traits) -> tuple[str, ...]:
    """High noise comes first."""
    return EXPERTS if takes_expert(traits.variant) else ()


def make_pipeline(source: ModelSource, transformers: Sequence[nn.Module], picture: Picture) -> Any:
    """Make the variant's pipeline; see `Sampling.make_pipeline`.

    Without an image TI2V-5B is a text-to-video model.
    """
    first: Any = transformers[0]
    second = transformers[1] if len(transformers) > 1 else None
    parts: dict[str, Any] = {
        "tokenizer": None,
        "text_encoder": None,
        "vae": _KnownLatents(source, picture.images, first.device),
        "scheduler": make_scheduler(source.traits),
        "transformer": first,
        "transformer_2": second,
        "boundary_ratio": None if second is None else BOUNDARY_RATIO[source.traits.variant],
        "expand_timesteps": source.traits.image_optional,
    }
    if not picture.images:
        return WanPipeline(**parts)
    pipeline = _KnownImages(**parts)
    pipeline.known_embeds = _image_embeds(source.traits, picture.images)
    return pipeline


def make_scheduler(traits: Traits) -> UniPCMultistepScheduler:
    """The sampler that the authors publish, with their shift."""
    return UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=traits.shift
    )


def arguments(source: ModelSource, picture: Picture) -> dict[str, Any]:
    """What the pipeline is called with; see `Sampling.arguments`."""
    negative = picture.negative
    found: dict[str, Any] = {
        "height": picture.height,
        "width": picture.width,
        "num_frames": picture.frames,
        "num_inference_steps": picture.steps,
        "guidance_scale": picture.guidance,
        "prompt_embeds": padded(picture.text["text"])[None],
        "negative_prompt_embeds": None if negative is None else padded(negative["text"])[None],
    }
    if picture.images:
        # The pipeline wants to see the images, whose encodings it is given by other ways.
        grey = torch.zeros(1, 3, picture.height, picture.width)
        found["image"] = grey
        if "last_image" in source.traits.image_inputs:
            found["last_image"] = grey
    return found


def _image_embeds(traits: Traits, images: Mapping[str, Tensor]) -> Tensor | None:
    return one_an_image(traits, images["image_embeds"]) if "image_embeds" in images else None


class _KnownImages(WanImageToVideoPipeline):
    """Takes the features of its images as given."""

    # No constructor of its own: diffusers reads the parts of a pipeline from the constructor's signature.
    known_embeds: Tensor | None = None

    def encode_image(self, image: Any, device: torch.device | None = None) -> Tensor:
        assert self.known_embeds is not None, "only variants with CLIP ask"
        return self.known_embeds.to(device)


class _KnownLatents(nn.Module):
    """Stands for the VAE: has its configuration, and knows the one encoding that it is asked for."""

    dtype = torch.float32

    def __init__(self, source: ModelSource, images: Mapping[str, Tensor], device: torch.device) -> None:
        super().__init__()
        assert source.vae is not None, "locate reports a missing VAE"
        with TensorFiles(*source.vae.files) as files, torch.device("meta"):
            self.config = AutoencoderKLWan.from_config(vae_config(source.vae, files.names)).config
        self.device = device
        known = images.get("image_latents", images.get("first_latent"))
        self._known = None if known is None else known.to(device)

    def encode(self, _pixels: Tensor) -> SimpleNamespace:
        """Return the latents as the VAE would, before they are normalized."""
        assert self._known is not None, "only a variant with images asks"
        mean, std = statistics(self.config, self.device)
        return SimpleNamespace(latents=(self._known.float() * std + mean)[None])


SAMPLING = Sampling(
    frames=17,
    guidance=lambda _traits: 5.0,
    takes_negative=lambda _traits: True,
    experts=experts,
    make_pipeline=make_pipeline,
    arguments=arguments,
    open_decoder=open_decoder,
)
