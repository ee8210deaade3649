"""What is measured: models by their widths, and micro-batches by their tokens. Data alone, no torch.

A token of Wan's transformer is 2×2 latent pixels of one latent frame.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from tworeel.errors import UserError, did_you_mean

PATCH = 2
"""Latent pixels of a token's side."""
MOST_POSITIONS = 1024
"""Tokens along one axis that the model has rotary tables for."""
TEMPORAL_STRIDE = 4
"""A clip has `TEMPORAL_STRIDE * k + 1` frames, which are k + 1 latent frames."""
TEXT_TOKENS = 512
HEAD_DIM = 128


@dataclass(frozen=True, kw_only=True)
class ModelShape:
    """Widths and depth of a transformer."""

    name: str
    dim: int
    ffn_dim: int
    blocks: int
    channels: int = 16
    """Of the latents."""
    text_dim: int = 4096
    spatial_stride: int = 8
    """Pixels of a latent pixel's side."""

    @property
    def heads(self) -> int:
        """Attention heads of `HEAD_DIM` each."""
        return self.dim // HEAD_DIM

    @property
    def multiple(self) -> int:
        """Pixels of a token's side."""
        return PATCH * self.spatial_stride


@dataclass(frozen=True, kw_only=True)
class Case:
    """One step to measure: so many micro-batches of so many tokens."""

    name: str
    model: ModelShape
    grid: tuple[int, int, int]
    """Tokens along latent frames, height and width."""
    micro_batches: int

    @property
    def tokens(self) -> int:
        """Tokens of a micro-batch."""
        frames, height, width = self.grid
        return frames * height * width


WAN_14B = ModelShape(name="wan-14b", dim=5120, ffn_dim=13824, blocks=40)
TINY = ModelShape(name="tiny", dim=256, ffn_dim=512, blocks=4, text_dim=64)
MODELS = {
    shape.name: shape
    for shape in (
        WAN_14B,
        ModelShape(name="wan-1.3b", dim=1536, ffn_dim=8960, blocks=30),
        ModelShape(name="wan-5b", dim=3072, ffn_dim=14336, blocks=30, channels=48, spatial_stride=16),
        TINY,
    )
}

DEFAULT_MODEL = WAN_14B.name

SHAPES: dict[str, str | int] = {
    "480x832x49": "480x832x49",
    "480x832x81": "480x832x81",
    "720x1280x81": "720x1280x81",
    "image-1024": 1024,
    "image-1536": 1536,
}
"""The shapes that have a name: pixels, or an image's tokens."""
STANDARD = ("480x832x49", "image-1024")
"""What `--shapes standard` stands for."""
TINY_TOKENS = 64

CLIP_MICRO_BATCHES = 8
IMAGE_MICRO_BATCHES = 16
TINY_MICRO_BATCHES = 4
_IMAGE_TOKENS = 2048
"""A micro-batch of fewer tokens is so short that a step takes more of them."""


def model_shape(name: str) -> ModelShape:
    """The model of this name.

    Raises:
        UserError: there is none.
    """
    if name not in MODELS:
        raise UserError(f"--model {name}: must be one of {', '.join(MODELS)}{did_you_mean(name, MODELS)}")
    return MODELS[name]


def make_cases(
    model: ModelShape,
    *,
    shapes: Sequence[str] = (),
    tokens: Sequence[int] = (),
    micro_batches: Sequence[int] = (),
) -> list[Case]:
    """The cases that names, sizes and token counts ask for; the standard ones if nothing does.

    Args:
        model: which runs them.
        shapes: names of `SHAPES`, `standard`, or `WIDTHxHEIGHTxFRAMES` in pixels.
        tokens: of one latent frame each, as square as the number allows.
        micro_batches: of a step, one case each; by default 8, and 16 for images.

    Raises:
        UserError: an unknown name, a size that the model cannot have, tokens that fill no rectangle.
    """
    if not shapes and not tokens:
        shapes, tokens = ((), (TINY_TOKENS,)) if model == TINY else (("standard",), ())
    names = [name for given in shapes for name in (STANDARD if given == "standard" else (given,))]
    grids = {name: _grid_of(name, model) for name in names}
    grids |= {f"{count} tokens": square_grid(count, "--tokens") for count in tokens}
    return [
        Case(name=name, model=model, grid=grid, micro_batches=count)
        for name, grid in grids.items()
        for count in micro_batches or [_usual_count(model, grid)]
    ]


def square_grid(tokens: int, option: str) -> tuple[int, int, int]:
    """One latent frame of so many tokens: rows and columns as near to each other as the number allows.

    Raises:
        UserError: no rectangle within the rotary tables has so many.
    """
    rows = max((rows for rows in range(1, int(tokens**0.5) + 1) if tokens % rows == 0), default=0)
    if rows == 0 or tokens // rows > MOST_POSITIONS:
        raise UserError(f"{option} {tokens}: must be a product of two numbers of at most {MOST_POSITIONS}")
    return 1, rows, tokens // rows


def _grid_of(name: str, model: ModelShape) -> tuple[int, int, int]:
    shape = SHAPES.get(name, name)
    if isinstance(shape, int):
        return square_grid(shape, f"--shapes {name}:")
    pixels = re.fullmatch(r"(\d+)x(\d+)x(\d+)", shape)
    if pixels is None:
        near = did_you_mean(name, SHAPES)
        raise UserError(
            f"--shapes {name}: must be WIDTHxHEIGHTxFRAMES or one of standard, {', '.join(SHAPES)}{near}"
        )
    width, height, frames = map(int, pixels.groups())
    _check_pixels(name, model, width, height, frames)
    return (frames - 1) // TEMPORAL_STRIDE + 1, height // model.multiple, width // model.multiple


def _check_pixels(name: str, model: ModelShape, width: int, height: int, frames: int) -> None:
    multiple = model.multiple
    if min(width, height) < multiple or width % multiple or height % multiple:
        raise UserError(f"--shapes {name}: width and height must be multiples of {multiple} for {model.name}")
    if frames % TEMPORAL_STRIDE != 1:
        raise UserError(f"--shapes {name}: frames must be 4k+1, for example 49 or 81")
    most = MOST_POSITIONS * multiple
    if max(width, height) > most or frames > MOST_POSITIONS * TEMPORAL_STRIDE:
        raise UserError(f"--shapes {name}: width and height must be at most {most} for {model.name}")


def _usual_count(model: ModelShape, grid: tuple[int, int, int]) -> int:
    if model == TINY:
        return TINY_MICRO_BATCHES
    frames, height, width = grid
    return IMAGE_MICRO_BATCHES if frames * height * width < _IMAGE_TOKENS else CLIP_MICRO_BATCHES
