"""The networks beside FLUX.2's transformer: VAE, text encoder and its tokenizer."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from tworeel.models.companions import Kind, damage_of, find_component
from tworeel.models.family import Component, ModelRequest
from tworeel.models.flux2.text_files import find_text_encoder
from tworeel.models.flux2.text_networks import MISTRAL, QWEN

_BATCH_NORM = "bn.running_mean"


def _is_flux2_vae(names: Iterable[str]) -> bool:
    """FLUX.1's VAE has the same file name in its authors' repository, but no statistics of patches."""
    return any(name.endswith(_BATCH_NORM) for name in names)


_VAE = Kind(
    option="vae",
    title="VAE of FLUX.2",
    folder="vae",
    comfyui_folders=("vae",),
    pattern=r"^ae\.|flux[-_ .]?2.*(vae|ae)|full_encoder_small_decoder",
    example="flux2-vae.safetensors",
    is_one=_is_flux2_vae,
)


@dataclass(frozen=True, kw_only=True)
class Companions:
    """What was found, and what is wrong with it; without problems nothing is None."""

    vae: Component | None
    text_encoder: Component | None
    tokenizer: Path | None
    problems: tuple[str, ...]


def damaged_vae(request: ModelRequest, root: Path) -> tuple[str, ...]:
    """What of the VAE is damaged; which text encoder goes with a model that cannot be read is not known."""
    return damage_of(_VAE, request.vae, root)


def find_companions(request: ModelRequest, root: Path, variant: str, joint_attention_dim: int) -> Companions:
    """Find the encoders of a variant: where the request says, else in and near `root`."""
    problems: list[str] = []
    vae = find_component(_VAE, request.vae, root, problems)
    network = MISTRAL if variant == "flux2-dev" else QWEN
    text = find_text_encoder(request, root, network, joint_attention_dim)
    return Companions(
        vae=vae,
        text_encoder=text.component,
        tokenizer=text.tokenizer,
        problems=(*problems, *text.problems),
    )
