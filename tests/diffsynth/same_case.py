"""A tiny checkpoint and a clip that Tworeel's training and DiffSynth's both get, and what they give back.

Shape letters: C channels, F frames, H/W height and width of the latents, L tokens, D width.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tworeel.demo.checkpoint import write_checkpoint
from tworeel.demo.flux2_checkpoint import write_flux2_checkpoint
from tworeel.lora.naming import Naming
from tworeel.models.family import ModelRequest, ModelSource
from tworeel.models.flux2.conditioning import pack
from tworeel.models.registry import FAMILIES

RANK, LAYERS, TEXT = 2, 4, 96
SIZE = 32
"""Pixels of a clip's side; with FLUX.2 and the 5B model's strides of 16 still two latent pixels."""
WIDTH_OF_CLIP = 1280
"""DiffSynth knows no other."""


@dataclass(frozen=True, kw_only=True)
class Kind:
    """A model, and what a clip of it has in the cache."""

    variant: str
    latents: tuple[int, int, int, int]
    """C, F, H, W."""
    targets: str
    more: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    """Shapes of what the cache holds besides latents and text."""

    @property
    def family(self) -> str:
        return "wan" if self.variant.startswith("wan") else "flux2"


WAN_TARGETS = "q,k,v,o,ffn.0,ffn.2"
FLUX2_TARGETS = "to_q,to_k,to_v,to_out.0,add_q_proj,linear_in,linear_out,to_qkv_mlp_proj"
IMAGE = {"image_latents": (16, 2, 4, 4)}
KINDS = {
    "t2v": Kind(variant="wan2.1-t2v-1.3b", latents=(16, 2, 4, 4), targets=WAN_TARGETS),
    "i2v_a14b": Kind(variant="wan2.2-i2v-a14b", latents=(16, 2, 4, 4), targets=WAN_TARGETS, more=IMAGE),
    "i2v_clip": Kind(
        variant="wan2.1-i2v-14b",
        latents=(16, 2, 4, 4),
        targets=WAN_TARGETS,
        more=IMAGE | {"image_embeds": (257, WIDTH_OF_CLIP)},
    ),
    "ti2v_5b": Kind(
        variant="wan2.2-ti2v-5b",
        latents=(48, 3, 4, 4),
        targets=WAN_TARGETS,
        more={"first_latent": (48, 1, 4, 4)},
    ),
    "ti2v_5b_without_image": Kind(variant="wan2.2-ti2v-5b", latents=(48, 3, 4, 4), targets=WAN_TARGETS),
    "flux2_dev": Kind(variant="flux2-dev", latents=(16, 1, 2, 4), targets=FLUX2_TARGETS),
    "flux2_klein": Kind(variant="flux2-klein-base-4b", latents=(16, 1, 2, 4), targets=FLUX2_TARGETS),
    "flux2_edit": Kind(
        variant="flux2-dev",
        latents=(16, 1, 2, 4),
        targets=FLUX2_TARGETS,
        more={"reference_latents_0": (16, 1, 2, 2), "reference_latents_1": (16, 1, 1, 2)},
    ),
}


@dataclass(frozen=True)
class Trained:
    """What a micro-batch gave."""

    loss: float
    gradients: dict[str, Tensor]
    """By the names of `lora_parameters`."""


@dataclass(frozen=True)
class Case:
    """What both get."""

    kind: Kind
    folder: Path
    cached: dict[str, Tensor]
    """As Tworeel's encoders return it."""
    index: int
    """Of the noise level in the schedule of a thousand, which both have."""

    @property
    def lora(self) -> Path:
        return self.folder / "lora.safetensors"

    @property
    def naming(self) -> Naming:
        return Naming.of(FAMILIES[self.kind.family])

    @property
    def expert(self) -> str | None:
        return "high" if "a14b" in self.kind.variant else None


def make_case(name: str, folder: Path, index: int) -> Case:
    """Write the checkpoint, in the layout that DiffSynth reads, and draw a clip of the cache."""
    kind = KINDS[name]
    if kind.family == "wan":
        small = {"num_layers": LAYERS, "dim": 128, "ffn_dim": 128, "text_dim": TEXT}
        write_checkpoint(folder, variant=kind.variant, layout="native", dtype=torch.float32, **small)
    else:
        write_flux2_checkpoint(folder, variant=kind.variant, dtype=torch.float32)
    generator = torch.Generator().manual_seed(3)
    shapes = {"latents": kind.latents, "text": (512 if kind.family == "flux2" else 480, TEXT), **kind.more}
    cached = {key: torch.randn(shape, generator=generator) for key, shape in shapes.items()}
    if kind.family == "wan":
        # Keys that are nearly alike have a gradient that is mostly rounding.
        cached["text"] *= 10
    return Case(kind, folder, cached, index)


def noise_of(case: Case) -> Tensor:
    """What DiffSynth's loss draws as noise after the timestep, C, F, H, W.

    FLUX.2's tokens are a view of the latents there, and torch draws other numbers for a view.
    """
    latents = case.cached["latents"]
    torch.manual_seed(5)
    torch.randint(0, 1, (1,))
    if case.kind.family == "wan":
        return torch.randn_like(latents)
    return torch.randn_like(pack(latents)).T.reshape(latents.shape)


def source_of(case: Case) -> ModelSource:
    source = FAMILIES[case.kind.family].locate(ModelRequest(path=str(case.folder), expert=case.expert))
    assert source is not None and source.traits.variant == case.kind.variant
    return source


def schedule(case: Case) -> Any:
    """DiffSynth's schedule for training: `sigmas`, `timesteps` and `training_weight`."""
    from diffsynth.diffusion import FlowMatchScheduler

    scheduler = FlowMatchScheduler("Wan" if case.kind.family == "wan" else "FLUX.2")
    scheduler.set_timesteps(1000, training=True)
    return scheduler
