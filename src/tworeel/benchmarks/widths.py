"""The models that can be measured, by their widths. Data alone, no torch."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

TEXT_TOKENS = 512
HEAD_DIM = 128
TINY_TOKENS = 64

CLIP_MICRO_BATCHES = 8
IMAGE_MICRO_BATCHES = 16
TINY_MICRO_BATCHES = 4
_IMAGE_TOKENS = 2048
"""A micro-batch of fewer tokens is so short that a step of Wan's takes more of them."""


@dataclass(frozen=True, kw_only=True)
class ModelShape(ABC):
    """Widths and depth of a transformer, and what is usually measured with it."""

    name: str
    variant: str
    """What the family calls the model that has these widths."""
    dim: int
    blocks: int
    """Of all lists together."""
    channels: int
    """Of the latents."""
    text_dim: int
    tiny: bool = False
    """Computes in fp32, a step of a few tokens."""

    family: ClassVar[str]
    """Its name among `tworeel.models.registry.FAMILIES`."""
    sample: ClassVar[str]
    """What people call a micro-batch, with its article."""
    rank: ClassVar[int]
    """Of the LoRA that is usual."""
    temporal_stride: ClassVar[int]
    """A clip has `temporal_stride * k + 1` frames, which are k + 1 latent frames."""
    size_form: ClassVar[str]
    """How a size in pixels is written."""
    sizes: ClassVar[Mapping[str, str | int]]
    """The shapes that have a name: pixels, or an image's tokens."""
    standard: ClassVar[tuple[str, ...]]
    """What `--shapes standard` stands for."""

    @property
    def heads(self) -> int:
        """Attention heads of `HEAD_DIM` each."""
        return self.dim // HEAD_DIM

    @property
    def precision(self) -> str:
        """Of weights that are not quantized."""
        return "fp32" if self.tiny else "bf16"

    @property
    @abstractmethod
    def multiple(self) -> int:
        """Pixels of a token's side."""

    @abstractmethod
    def usual_micro_batches(self, tokens: int) -> int:
        """Micro-batches of a step, each of so many tokens."""

    @abstractmethod
    def config(self, blocks: int | None = None) -> dict[str, Any]:
        """The arguments of the transformer's class, with so many blocks; all by default."""


@dataclass(frozen=True, kw_only=True)
class WanShape(ModelShape):
    """A token of Wan's transformer is 2×2 latent pixels of one latent frame."""

    ffn_dim: int
    channels: int = 16
    text_dim: int = 4096
    spatial_stride: int = 8
    """Pixels of a latent pixel's side."""

    family: ClassVar[str] = "wan"
    sample: ClassVar[str] = "a clip"
    rank: ClassVar[int] = 32
    temporal_stride: ClassVar[int] = 4
    size_form: ClassVar[str] = "WIDTHxHEIGHTxFRAMES"
    sizes: ClassVar[Mapping[str, str | int]] = {
        "480x832x49": "480x832x49",
        "480x832x81": "480x832x81",
        "720x1280x81": "720x1280x81",
        "image-1024": 1024,
        "image-1536": 1536,
    }
    standard: ClassVar[tuple[str, ...]] = ("480x832x49", "image-1024")
    patch: ClassVar[int] = 2
    """Latent pixels of a token's side."""

    @property
    def multiple(self) -> int:
        """Pixels of a token's side."""
        return self.patch * self.spatial_stride

    def usual_micro_batches(self, tokens: int) -> int:
        """More of images, which are short."""
        if self.tiny:
            return TINY_MICRO_BATCHES
        return IMAGE_MICRO_BATCHES if tokens < _IMAGE_TOKENS else CLIP_MICRO_BATCHES

    def config(self, blocks: int | None = None) -> dict[str, Any]:
        """The arguments of the transformer's class, with so many blocks; all by default."""
        return {
            "num_attention_heads": self.heads,
            "attention_head_dim": HEAD_DIM,
            "in_channels": self.channels,
            "out_channels": self.channels,
            "text_dim": self.text_dim,
            "freq_dim": 256,
            "ffn_dim": self.ffn_dim,
            "num_layers": self.blocks if blocks is None else blocks,
        }


@dataclass(frozen=True, kw_only=True)
class Flux2Shape(ModelShape):
    """A token of FLUX.2's transformer is 2×2 latent pixels, which its latents' channels hold side by side."""

    doubles: int
    """Blocks with a stream for the image and one for the text; the others have one for both."""
    channels: int = 128

    family: ClassVar[str] = "flux2"
    sample: ClassVar[str] = "an image"
    rank: ClassVar[int] = 16
    temporal_stride: ClassVar[int] = 1
    size_form: ClassVar[str] = "WIDTHxHEIGHT"
    sizes: ClassVar[Mapping[str, str | int]] = {"512x512": "512x512", "1024x1024": "1024x1024"}
    standard: ClassVar[tuple[str, ...]] = ("512x512", "1024x1024")
    mlp_ratio: ClassVar[int] = 3
    """The feed-forward's width over the model's."""

    @property
    def multiple(self) -> int:
        """Pixels of a token's side."""
        return 16

    def usual_micro_batches(self, tokens: int) -> int:
        """The same for all sizes: the text's tokens are there anyway."""
        return TINY_MICRO_BATCHES if self.tiny else CLIP_MICRO_BATCHES

    def config(self, blocks: int | None = None) -> dict[str, Any]:
        """The arguments of the transformer's class, with so many blocks; both kinds keep their shares."""
        count = self.blocks if blocks is None else blocks
        doubles = max(1, round(count * self.doubles / self.blocks))
        return {
            "num_attention_heads": self.heads,
            "attention_head_dim": HEAD_DIM,
            "in_channels": self.channels,
            "joint_attention_dim": self.text_dim,
            "mlp_ratio": float(self.mlp_ratio),
            "num_layers": doubles,
            "num_single_layers": count - doubles,
            "guidance_embeds": self.variant == "flux2-dev",
        }


WAN_14B = WanShape(name="wan-14b", variant="wan2.1-t2v-14b", dim=5120, ffn_dim=13824, blocks=40)
WAN_1_3B = WanShape(name="wan-1.3b", variant="wan2.1-t2v-1.3b", dim=1536, ffn_dim=8960, blocks=30)
TINY = replace(WAN_1_3B, name="tiny", dim=256, ffn_dim=512, blocks=4, text_dim=64, tiny=True)
WAN_5B = WanShape(
    name="wan-5b",
    variant="wan2.2-ti2v-5b",
    dim=3072,
    ffn_dim=14336,
    blocks=30,
    channels=48,
    spatial_stride=16,
)
FLUX2_DEV = Flux2Shape(name="flux2-dev", variant="flux2-dev", dim=6144, blocks=56, doubles=8, text_dim=15360)
KLEIN_4B = Flux2Shape(
    name="flux2-klein-4b", variant="flux2-klein-4b", dim=3072, blocks=25, doubles=5, text_dim=7680
)
KLEIN_9B = Flux2Shape(
    name="flux2-klein-9b", variant="flux2-klein-9b", dim=4096, blocks=32, doubles=8, text_dim=12288
)
TINY_FLUX2 = replace(
    FLUX2_DEV,
    name="tiny-flux2",
    dim=256,
    blocks=5,
    doubles=2,
    channels=16,
    text_dim=96,
    tiny=True,
)
MODELS: dict[str, ModelShape] = {
    shape.name: shape
    for shape in (WAN_14B, WAN_1_3B, WAN_5B, FLUX2_DEV, KLEIN_4B, KLEIN_9B, TINY, TINY_FLUX2)
}
DEFAULT_MODEL = WAN_14B.name


def tiny_shape(model: ModelShape) -> ModelShape:
    """The tiny model of the same family."""
    return next(shape for shape in MODELS.values() if shape.tiny and shape.family == model.family)
