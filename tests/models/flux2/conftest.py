"""Tiny FLUX.2 text encoders, written once in a session."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from pathlib import Path

import pytest

from tworeel.demo.tiny_flux2_encoders import TextKind, write_flux2_text_encoder, write_flux2_tokenizer
from tworeel.models.family import Component, Layout, ModelSource, Traits

TRAITS = Traits(
    family="flux2",
    variant="flux2-dev",
    frame_rate=1,
    spatial_multiple=16,
    temporal_stride=1,
    tokens_per_pixel_area=256,
)


@pytest.fixture(scope="session")
def flux2_source(tmp_path_factory: pytest.TempPathFactory) -> Callable[[TextKind, Layout], ModelSource]:
    """A function (kind, layout) -> a model of which only the text encoder and the tokenizer are there."""
    root = tmp_path_factory.mktemp("flux2-text")

    @functools.cache
    def source(kind: TextKind, layout: Layout) -> ModelSource:
        folder = root / f"{kind}-{layout}"
        return ModelSource(
            traits=TRAITS,
            transformer=Component(files=(), layout="diffusers"),
            text_encoder=_component(write_flux2_text_encoder(folder, layout, kind), layout),
            tokenizer=write_flux2_tokenizer(folder, kind),
        )

    return source


def _component(path: Path, layout: Layout) -> Component:
    if path.is_file():
        return Component(files=(path,), layout=layout)
    config = json.loads((path / "config.json").read_text(encoding="utf-8"))
    files = tuple(path.glob("*.safetensors.index.json")) or tuple(path.glob("*.safetensors"))
    return Component(files=files, layout=layout, config=config)
