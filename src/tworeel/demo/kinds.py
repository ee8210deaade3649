"""What the demos train: a tiny model of each family, and a dataset for it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tworeel.demo.checkpoint import write_checkpoint
from tworeel.demo.clips import write_clips, write_edits
from tworeel.demo.flux2_checkpoint import write_flux2_checkpoint


@dataclass(frozen=True, kw_only=True)
class Demo:
    """One family's demo; paths are inside the demo's folder."""

    variant: str
    write_model: Callable[[Path], Any]
    """Writes the tiny checkpoint into a folder."""
    write_data: Callable[[Path], Any]
    data: str
    """The dataset's folder."""
    settings: Mapping[str, str]
    """Lines of sections of the configuration."""
    prompt: str
    contents: Mapping[str, str]
    """What is special about it, beside what every demo leaves."""


WAN = Demo(
    variant="wan2.1-t2v-1.3b",
    write_model=lambda folder: write_checkpoint(folder, variant="wan2.1-t2v-1.3b", layout="native"),
    write_data=write_clips,
    data="clips",
    settings={"data": "resolution = [96, 64]\nframes = [1, 9, 17]", "sample": "frames = 9"},
    prompt="A red circle moves from left to right over a soft gradient.",
    contents={
        "clips": "the dataset: drawn clips, each with its caption in a .txt file",
        "model": "a tiny wan2.1-t2v-1.3b with random weights, in the layout of Wan's own repository",
    },
)

FLUX2 = Demo(
    variant="flux2-klein-base-4b",
    write_model=lambda folder: write_flux2_checkpoint(folder, variant="flux2-klein-base-4b"),
    write_data=write_edits,
    data="images",
    settings={"data": "resolution = [96, 64]", "sample": 'image = "images/before_0.png"'},
    prompt="Put a red circle on it.",
    contents={
        "images": "the dataset: drawn images, each with its reference image and caption in metadata.jsonl",
        "model": "a tiny flux2-klein-base-4b with random weights, in diffusers' layout",
    },
)

DEMOS: Mapping[str, Demo] = {"wan": WAN, "flux2": FLUX2}
