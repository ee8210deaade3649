"""What is measured: micro-batches by their tokens. Data alone, no torch."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from tworeel.benchmarks.widths import MODELS, TINY_TOKENS, ModelShape
from tworeel.errors import UserError, collected, did_you_mean, raise_if_any

MOST_POSITIONS = 1024
"""Tokens along one axis: Wan has rotary tables for as many."""


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
        """Tokens of a micro-batch, the text's apart."""
        frames, height, width = self.grid
        return frames * height * width


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
        shapes: names of the model's sizes, `standard`, or pixels in the model's form, for example
            `WIDTHxHEIGHTxFRAMES`.
        tokens: of one latent frame each, as square as the number allows.
        micro_batches: of a step, one case each; by default as many as the model usually takes.

    Raises:
        UserError: an unknown name, a size that the model cannot have, tokens that fill no rectangle.
    """
    if not shapes and not tokens:
        shapes, tokens = ((), (TINY_TOKENS,)) if model.tiny else (("standard",), ())
    names = [name for given in shapes for name in (model.standard if given == "standard" else (given,))]
    grids, problems = {}, list[str]()
    for name in names:
        with collected(problems):
            grids[name] = _grid_of(name, model)
    for count in tokens:
        with collected(problems):
            grids[f"{count} tokens"] = square_grid(count, "--tokens")
    raise_if_any(problems)
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
    shape = model.sizes.get(name, name)
    if isinstance(shape, int):
        return square_grid(shape, f"--shapes {name}:")
    if not re.fullmatch("x".join("[0-9]+" for _ in model.size_form.split("x")), shape):
        raise UserError(
            f"--shapes {name}: must be {model.size_form} or one of standard, {', '.join(model.sizes)}"
            f"{did_you_mean(name, model.sizes)}"
        )
    width, height, frames = [*map(int, shape.split("x")), 1][:3]  # an image has one frame
    _check_pixels(name, model, width, height, frames)
    return (frames - 1) // model.temporal_stride + 1, height // model.multiple, width // model.multiple


def _check_pixels(name: str, model: ModelShape, width: int, height: int, frames: int) -> None:
    multiple, stride = model.multiple, model.temporal_stride
    if min(width, height) < multiple or width % multiple or height % multiple:
        raise UserError(f"--shapes {name}: width and height must be multiples of {multiple} for {model.name}")
    if frames < 1 or (frames - 1) % stride:
        raise UserError(f"--shapes {name}: frames must be {stride}k+1, for example 49 or 81")
    most = MOST_POSITIONS * multiple
    if max(width, height) > most or frames > MOST_POSITIONS * stride:
        raise UserError(f"--shapes {name}: width and height must be at most {most} for {model.name}")


def _usual_count(model: ModelShape, grid: tuple[int, int, int]) -> int:
    frames, height, width = grid
    return model.usual_micro_batches(frames * height * width)
