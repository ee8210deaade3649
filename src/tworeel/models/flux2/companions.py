"""The networks beside FLUX.2's transformer: VAE, text encoder and its tokenizer."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from tworeel.models.companions import Kind, TokenizerKind, find_component, find_tokenizer
from tworeel.models.family import Component, ModelRequest

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
_TEXT = {
    "flux2-dev": (r"mistral[-_ ]?3", "mistral_3_small_flux2_bf16.safetensors"),
    "4b": (r"qwen[-_ .]?3[-_ .]?4b", "qwen_3_4b.safetensors"),
    "9b": (r"qwen[-_ .]?3[-_ .]?8b", "qwen_3_8b.safetensors"),
}
"""Pattern and example of the text encoder's file name, by the end of the variant's name."""
_TOKENIZER = TokenizerKind(
    files=("tokenizer.json", "tekken.json", "vocab.json"),
    folders=("tokenizer",),
    embedded="tekken_model",
    example="tokenizer/",
)


@dataclass(frozen=True, kw_only=True)
class Companions:
    """What was found, and what is wrong with it; without problems nothing is None."""

    vae: Component | None
    text_encoder: Component | None
    tokenizer: Path | None
    problems: tuple[str, ...]


def find_companions(request: ModelRequest, root: Path, variant: str) -> Companions:
    """Find the encoders of a variant: where the request says, else in and near `root`."""
    problems: list[str] = []
    vae = find_component(_VAE, request.vae, root, problems)
    text_encoder = find_component(_text_kind(variant), request.text_encoder, root, problems)
    return Companions(
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=find_tokenizer(_TOKENIZER, request.tokenizer, text_encoder, root, problems),
        problems=tuple(problems),
    )


def _text_kind(variant: str) -> Kind:
    pattern, example = next(found for end, found in _TEXT.items() if variant.endswith(end))
    return Kind(
        option="text_encoder",
        title="text encoder",
        folder="text_encoder",
        comfyui_folders=("text_encoders", "clip"),
        pattern=pattern,
        example=example,
    )
