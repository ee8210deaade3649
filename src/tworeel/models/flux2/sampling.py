"""FLUX.2's pipelines in diffusers, with what the encoders returned in the encoders' places."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import torch
from diffusers import (
    AutoencoderKLFlux2,
    FlowMatchEulerDiscreteScheduler,
    Flux2KleinPipeline,
    Flux2Pipeline,
)
from PIL import Image
from torch import Tensor, nn

from tworeel.models.family import ModelSource, Picture, Sampling, Traits
from tworeel.models.flux2.conditioning import PATCH, REFERENCE_STEP, image_ids, pack, references_of
from tworeel.models.flux2.vae import read_statistics, vae_config
from tworeel.models.flux2.vae_decoder import open_decoder
from tworeel.weights.tensor_files import TensorFiles


def make_pipeline(source: ModelSource, transformers: Sequence[nn.Module], picture: Picture) -> Any:
    """Make the variant's pipeline; see `Sampling.make_pipeline`."""
    transformer: Any = transformers[0]
    parts: dict[str, Any] = {
        "tokenizer": None,
        "text_encoder": None,
        "vae": _Statistics(source, transformer.device),
        "scheduler": make_scheduler(),
        "transformer": transformer,
    }
    if _is_dev(source.traits):
        pipeline: Any = _Dev(**parts)
    else:
        pipeline = _Klein(**parts, is_distilled=is_distilled(source.traits))
    pipeline.known_references = references_of(picture.images)
    return pipeline


def make_scheduler() -> FlowMatchEulerDiscreteScheduler:
    """The sampler that the authors publish; the pipelines shift it by the size of the image."""
    return FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, shift=3.0, max_shift=1.15)


def arguments(source: ModelSource, picture: Picture) -> dict[str, Any]:
    """What the pipeline is called with; see `Sampling.arguments`."""
    found: dict[str, Any] = {
        "height": picture.height,
        "width": picture.width,
        "num_inference_steps": picture.steps,
        "guidance_scale": picture.guidance,
        "prompt_embeds": picture.text["text"][None],
    }
    if references := references_of(picture.images):
        # The pipeline wants to see the images, whose encodings it is given by other ways.
        found["image"] = [Image.new("RGB", _size(latents)) for latents in references]
    if picture.negative is not None:
        found["negative_prompt_embeds"] = picture.negative["text"][None]
    return found


def is_distilled(traits: Traits) -> bool:
    """Whether a model was distilled to a few steps without guidance: klein, not its base models."""
    return not _is_dev(traits) and "-base-" not in traits.variant


def _is_dev(traits: Traits) -> bool:
    return traits.variant == "flux2-dev"


def _guidance(traits: Traits) -> float:
    return 1.0 if is_distilled(traits) else 4.0


def _takes_negative(traits: Traits) -> bool:
    """dev embeds its guidance: it takes one pass."""
    return not _is_dev(traits)


def _size(latents: Tensor) -> tuple[int, int]:
    height, width = latents.shape[-2:]
    return PATCH * width, PATCH * height


def _packed(references: Sequence[Tensor], device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The reference images' tokens and their coordinates, as the pipelines' own method returns them."""
    tokens = torch.cat([pack(latents) for latents in references])
    ids = [image_ids(latents, REFERENCE_STEP * (i + 1)) for i, latents in enumerate(references)]
    return tokens[None].to(device, dtype), torch.cat(ids)[None].to(device)


class _KnownReferences:
    """Takes a pipeline's reference images as given."""

    # No constructor of its own: diffusers reads the parts of a pipeline from the constructor's signature.
    known_references: Sequence[Tensor] = ()

    def prepare_image_latents(
        self, images: Any, batch_size: int, generator: Any, device: Any, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor]:
        return _packed(self.known_references, device, dtype)


class _Dev(_KnownReferences, Flux2Pipeline):
    """FLUX.2-dev's."""


class _Klein(_KnownReferences, Flux2KleinPipeline):
    """klein's, distilled or not."""


class _Statistics(nn.Module):
    """Stands for the VAE: has its configuration and its latents' statistics."""

    dtype = torch.float32

    def __init__(self, source: ModelSource, device: torch.device) -> None:
        super().__init__()
        assert source.vae is not None, "locate reports a missing VAE"
        with TensorFiles(*source.vae.files) as files, torch.device("meta"):
            self.config = AutoencoderKLFlux2.from_config(vae_config(source.vae, files.names)).config
        self.device = device
        known: Mapping[str, Tensor] = read_statistics(source.vae)
        self.bn = SimpleNamespace(**{name: tensor.to(device) for name, tensor in known.items()})


SAMPLING = Sampling(
    frames=1,
    guidance=_guidance,
    takes_negative=_takes_negative,
    experts=lambda _traits: (),
    make_pipeline=make_pipeline,
    arguments=arguments,
    open_decoder=open_decoder,
)
