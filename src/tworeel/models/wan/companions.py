"""The networks beside Wan's transformer: VAE, text encoder with its tokenizer, CLIP image encoder."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from tworeel.models.companions import Kind, TokenizerKind, damage_of, find_component, find_tokenizer
from tworeel.models.family import Component, ModelRequest
from tworeel.models.wan.text import TOKENIZER_FILES
from tworeel.models.wan.variants import needs_image_encoder

_VAE_2_1 = Kind(
    option="vae",
    title="VAE",
    folder="vae",
    comfyui_folders=("vae",),
    pattern=r"wan[-_ ]?2[._]1.*vae",
    example="Wan2.1_VAE.pth",
)
_VAE_2_2 = replace(_VAE_2_1, pattern=r"wan[-_ ]?2[._]2.*vae", example="Wan2.2_VAE.pth")
_TEXT = Kind(
    option="text_encoder",
    title="text encoder",
    folder="text_encoder",
    comfyui_folders=("text_encoders", "clip"),
    pattern=r"umt5[-_]?xxl",
    example="models_t5_umt5-xxl-enc-bf16.pth",
)
_IMAGE = Kind(
    option="image_encoder",
    title="CLIP image encoder",
    folder="image_encoder",
    comfyui_folders=("clip_vision",),
    pattern=r"clip[-_]vision[-_]h|clip.*xlm[-_]roberta.*vit[-_]huge",
    example="clip_vision_h.safetensors",
)
_TOKENIZER = TokenizerKind(
    files=TOKENIZER_FILES,
    folders=("tokenizer", "google/umt5-xxl"),
    embedded="spiece_model",
    example="google/umt5-xxl/ or tokenizer/",
)


@dataclass(frozen=True, kw_only=True)
class Companions:
    """What was found, and what is wrong with it; without problems only `image_encoder` may be None."""

    vae: Component | None
    text_encoder: Component | None
    tokenizer: Path | None
    image_encoder: Component | None
    problems: tuple[str, ...]


def damaged_companions(request: ModelRequest, root: Path) -> list[str]:
    """What is damaged of the encoders of whichever variant, where it cannot be told."""
    asked = (
        (_VAE_2_1, request.vae),
        (_VAE_2_2, request.vae),
        (_TEXT, request.text_encoder),
        (_IMAGE, request.image_encoder),
    )
    return [line for kind, given in asked for line in damage_of(kind, given, root)]


def find_companions(request: ModelRequest, root: Path, variant: str) -> Companions:
    """Find the encoders that a variant needs: where the request says, else in and near `root`.

    Every file is opened once, so that damage is reported now rather than when its turn comes.
    """
    problems: list[str] = []
    vae = find_component(_VAE_2_2 if variant == "wan2.2-ti2v-5b" else _VAE_2_1, request.vae, root, problems)
    text_encoder = find_component(_TEXT, request.text_encoder, root, problems)
    image_encoder = None
    if needs_image_encoder(variant):
        image_encoder = find_component(_IMAGE, request.image_encoder, root, problems)
    return Companions(
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=find_tokenizer(_TOKENIZER, request.tokenizer, text_encoder, root, problems),
        image_encoder=image_encoder,
        problems=tuple(problems),
    )
