"""The family contract: what Tworeel has to know of a kind of model, as data plus a few functions.

A family is one folder beside this file. It says where its tensors are (`locate`), which lists of blocks its
transformer has, which names its LoRA targets have, how its encoders are opened and how a cached sample
becomes a training sample. Everything else (splitting, loading, caching, training, export) is shared.

Shape letters: B batch, C channels, F latent frames, H/W latent height and width, L tokens, D width.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from tworeel.weights.rows import Names

Layout = Literal["diffusers", "native", "comfyui"]


@dataclass(frozen=True, kw_only=True)
class ModelRequest:
    """What the user asked for: a hub id, a folder or a file, and files of it that lie elsewhere."""

    path: str
    expert: str | None = None
    vae: str | None = None
    text_encoder: str | None = None
    tokenizer: str | None = None
    image_encoder: str | None = None


@dataclass(frozen=True, kw_only=True)
class Traits:
    """What data and training must know of one model; found by looking at its files."""

    family: str
    variant: str
    """For example `wan2.2-t2v-a14b`."""
    expert: str | None = None
    frame_rate: float
    """Frames a second that the model was trained at."""
    spatial_multiple: int
    """Height and width in pixels must be multiples of this (VAE stride times patch size)."""
    temporal_stride: int
    """Clips have `temporal_stride * k + 1` frames."""
    tokens_per_pixel_area: int
    """Pixels of one latent frame that one token stands for (16 × 16 = 256 for Wan 14B)."""
    joint_text_tokens: int = 0
    """Tokens of the caption that run through the blocks with the clip's; 0 where these only attend to it."""
    image_inputs: tuple[str, ...] = ()
    """Images that condition the model: `first_image`, `last_image`. Taken from the clip unless given."""
    image_optional: bool = False
    """True where the model also trains without an image (TI2V-5B)."""
    sigma_range: tuple[float, float] = (0.0, 1.0)
    """This expert's share of the noise levels, as (low, high] in sigma."""
    shift: float = 5.0
    """Shift of the flow-matching schedule that the model's authors sample with."""
    training_shift: float = 5.0
    """Shift of the schedule that it is trained with by default."""
    images_only: bool = False
    """True where clips are single images."""
    reference_images: int = 0
    """The most images, of any size, that a clip may be shown beside its caption ("edit" models)."""
    reference_area: int = 1024 * 1024
    """Larger reference images are made smaller, to this area in pixels."""

    @property
    def needs_image(self) -> bool:
        """Whether every clip is conditioned on its images (I2V, FLF2V)."""
        return bool(self.image_inputs) and not self.image_optional


@dataclass(frozen=True, kw_only=True)
class Component:
    """One network: its files, how its keys are written, and the arguments of the class that runs it."""

    files: tuple[Path, ...]
    layout: Layout
    config: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class ModelSource:
    """A model that was found on disk; nothing but headers and configs has been read."""

    traits: Traits
    transformer: Component
    vae: Component | None = None
    text_encoder: Component | None = None
    tokenizer: Path | None = None
    """A tokenizer folder, or a safetensors file with an embedded sentencepiece model."""
    image_encoder: Component | None = None


class LatentEncoder(Protocol):
    """Encodes clips (and their condition images) on one device."""

    def encode(self, clip: Tensor, images: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Encode one clip.

        Args:
            clip: uint8, shape (3, frames, height, width), RGB.
            images: uint8, shape (3, height, width) each, by the names of `Traits.image_inputs`; an image
                that is not given comes from the clip. Reference images have sizes of their own and the names
                `reference_image_0`, `reference_image_1`, …

        Returns:
            CPU tensors by name; `latents` of shape (C, F, H, W), fp32, is always among them.
        """
        ...


class TextEncoder(Protocol):
    """Embeds captions on one device, or on several together."""

    def encode(self, caption: str) -> dict[str, Tensor]:
        """Embed one caption: CPU tensors by name; `text` has shape (L, D), L as the transformer wants it."""
        ...


@runtime_checkable
class BatchTextEncoder(TextEncoder, Protocol):
    """Embeds several captions at a time, where they share the reading of the weights."""

    batch_size: int
    """How many captions are wanted at a time."""

    def encode_batch(self, captions: Sequence[str]) -> list[dict[str, Tensor]]:
        """Embed captions; for each of them what `encode` returns."""
        ...


TextPlacement = Literal["auto", "each", "spread", "cpu"]
TextQuantize = Literal["auto", "fp8", "int8", "nf4"]


@dataclass(frozen=True, kw_only=True)
class TextOptions:
    """How the user wants captions embedded (`cache.text_placement`, `cache.text_quantize`)."""

    placement: TextPlacement = "auto"
    quantize: TextQuantize | None = "auto"


@dataclass(frozen=True, kw_only=True)
class TextWorker:
    """A text encoder that can be opened now: it has been looked whether there is room for it."""

    device: torch.device
    """Where captions go in; the current device while they are embedded."""
    open: Callable[[], TextEncoder]
    how: str = ""
    """Where and in which precision it runs, for people; empty where that is nothing special."""


@dataclass(frozen=True, kw_only=True)
class TrainingSample:
    """One micro-batch as the transformer takes it."""

    inputs: dict[str, Any]
    """Keyword arguments of the transformer's forward; tensors have a batch axis of 1."""
    target: Tensor
    """fp32, the shape of the transformer's output: (1, C, F, H, W) or, of tokens, (1, L, C).

    An output that is longer along axis 1 ends with tokens that only condition; they have no loss."""
    loss_mask: Tensor | None = None
    """fp32, broadcastable to `target`; 0 where the loss is not counted. None counts everything."""


@dataclass(frozen=True, kw_only=True)
class Picture:
    """What a preview is made from, beside the seed: an image, or a video where there are several frames."""

    text: Mapping[str, Tensor]
    """What the text encoder returned for the prompt, on the CPU."""
    negative: Mapping[str, Tensor] | None = None
    """The same for the negative prompt; always there where `guidance` is above 1."""
    images: Mapping[str, Tensor] = field(default_factory=dict)
    """What the latent encoder returned for the condition images, on the CPU; empty without images."""
    width: int
    """Pixels."""
    height: int
    frames: int
    steps: int
    """Denoising steps."""
    guidance: float


class LatentDecoder(Protocol):
    """Decodes on one device."""

    def decode(self, latents: Tensor, picture: Picture) -> Tensor:
        """Decode what the pipeline returned for `output_type="latent"`: uint8 (frames, height, width, 3)."""
        ...


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How a family's previews are rendered: by diffusers' own pipeline, without any of its encoders.

    Text and images are encoded before the transformer is loaded, and latents are decoded apart, so that the
    networks never share a device's memory.
    """

    frames: int
    """Frames of a preview where the user does not say: 1 is an image."""
    guidance: Callable[[Traits], float]
    """Guidance of a variant where the user does not say."""
    takes_negative: Callable[[Traits], bool]
    """Whether a variant's guidance above 1 takes a second pass, with the negative prompt."""
    experts: Callable[[Traits], tuple[str, ...]]
    """The experts that a variant needs for a whole rendering, in the order of their use; () if it has none.
    They take turns: never are two of them loaded."""
    make_pipeline: Callable[[ModelSource, Sequence[nn.Module], Picture], Any]
    """(source, transformers, picture) -> diffusers' pipeline. The transformers are one, or one for each of
    `experts`; they stand for loaded ones: they have `config`, `dtype`, `device`, a forward and a
    `cache_context`, and no parameters. No VAE or encoder is there for the pipeline: what it asks of them has
    to come from the picture."""
    arguments: Callable[[ModelSource, Picture], dict[str, Any]]
    """(source, picture) -> what the pipeline is called with, beside `generator`, `output_type="latent"` and
    `return_dict=False`."""
    open_decoder: Callable[[ModelSource, torch.device, torch.dtype], LatentDecoder]


@dataclass(frozen=True, kw_only=True)
class Family:
    """Everything that one family says of itself."""

    name: str
    block_lists: tuple[str, ...]
    """Attribute paths of the transformer's lists of blocks, in the order of the forward."""
    keep_fp32: tuple[str, ...]
    """Parameters with one of these strings as a dotted part of their name stay in fp32."""
    lora_presets: Mapping[str, tuple[str, ...]]
    """Named sets of LoRA targets: endings of module names in the transformer (diffusers' names)."""

    locate: Callable[[ModelRequest], ModelSource | None]
    """Recognize a model by looking at its files; None if it is not of this family.

    Raises `UserError` with every problem found (a missing expert, a truncated file, a missing encoder)."""
    build_transformer: Callable[[Component], nn.Module]
    """Make the transformer on the meta device."""
    parameter_name: Callable[[Layout, str], Names]
    """A key in a transformer file of this layout -> the parameter's name, or the parameters that have its
    rows where the file fuses them; None for keys to ignore."""
    to_native: Callable[[str], str]
    """A module's name in the transformer (`blocks.0.attn1.to_q`) -> its name in the authors' own code."""
    from_native: Callable[[str], str]
    """The inverse of `to_native`."""
    native_words: tuple[str, ...] = ()
    """Parts of native names that hold an underscore of their own (`self_attn`); kohya's LoRA files join the
    parts of a name with underscores."""
    own_words: tuple[str, ...] = ()
    """The same of diffusers' names, which some tools join too."""
    native_parts: Callable[[str], tuple[str, ...]] | None = None
    """A native layer's name -> the layers whose rows it stacks, in equal shares (query, key, value).
    `to_native` gives that name for each of them. None if every layer has a native one of its own."""
    native_only: Callable[[str], bool] | None = None
    """Whether a native layer is one of variants that only others train, and diffusers has no name for."""
    native_swapped: tuple[str, ...] = ()
    """Layers whose two halves of rows stand the other way round natively."""
    diffsynth_names: Literal["native", "diffusers"] = "native"
    """Whose names DiffSynth-Studio's own code has, and so its LoRA files."""

    latent_identity: Callable[[ModelSource], str]
    """A hash of the networks that encode clips (VAE, image encoder); read without loading them."""
    text_identity: Callable[[ModelSource], str]
    """A hash of the text encoder and its tokenizer; read without loading them."""
    open_latent_encoder: Callable[[ModelSource, torch.device, torch.dtype], LatentEncoder]
    open_text_encoder: Callable[[ModelSource, torch.device, torch.dtype], TextEncoder]

    text_workers: (
        Callable[[ModelSource, Sequence[torch.device], torch.dtype, TextOptions], Sequence[TextWorker]] | None
    ) = None
    """Place text encoders on devices, by what is free there; several embed captions side by side. None where
    each device has room for one of its own.

    Raises `UserError` where the options cannot be met."""

    cached_shapes: Callable[..., Mapping[str, tuple[int, ...]]]
    """(source, frames, height, width in pixels, references) -> shapes of what the encoders return for a clip
    of that size, reference images of these (height, width) and the longest caption."""
    make_sample: Callable[..., TrainingSample]
    """(traits, cached, noise, sigma, *, dtype, condition_on_image) -> TrainingSample; `cached` holds what
    the encoders returned."""

    sampling: Sampling | None = None
    """None where there are no previews yet."""
