"""The networks beside Wan's transformer: VAE, text encoder with its tokenizer, CLIP image encoder."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from tworeel.errors import UserError
from tworeel.models.family import Component, Layout, ModelRequest
from tworeel.models.network_files import read_json, weight_files
from tworeel.models.wan.text import TOKENIZER_FILES
from tworeel.models.wan.variants import needs_image_encoder
from tworeel.weights.tensor_files import PICKLE_SUFFIXES, SUFFIXES, TensorFiles

_TOKENIZER_FOLDERS = ("tokenizer", "google/umt5-xxl")
_EMBEDDED_TOKENIZER = "spiece_model"
_LEVELS_UP = 3  # from a transformer in a subfolder of ComfyUI's models/diffusion_models up to models/


@dataclass(frozen=True)
class _Kind:
    """How one network is called, in each layout."""

    option: str
    title: str
    folder: str
    comfyui_folders: tuple[str, ...]
    pattern: str
    example: str


_VAE_2_1 = _Kind("vae", "VAE", "vae", ("vae",), r"wan[-_ ]?2[._]1.*vae", "Wan2.1_VAE.pth")
_VAE_2_2 = _Kind("vae", "VAE", "vae", ("vae",), r"wan[-_ ]?2[._]2.*vae", "Wan2.2_VAE.pth")
_TEXT = _Kind(
    "text_encoder",
    "text encoder",
    "text_encoder",
    ("text_encoders", "clip"),
    r"umt5[-_]?xxl",
    "models_t5_umt5-xxl-enc-bf16.pth",
)
_IMAGE = _Kind(
    "image_encoder",
    "CLIP image encoder",
    "image_encoder",
    ("clip_vision",),
    r"clip[-_]vision[-_]h|clip.*xlm[-_]roberta.*vit[-_]huge",
    "clip_vision_h.safetensors",
)


@dataclass(frozen=True, kw_only=True)
class Companions:
    """What was found, and what is wrong with it; without problems only `image_encoder` may be None."""

    vae: Component | None
    text_encoder: Component | None
    tokenizer: Path | None
    image_encoder: Component | None
    problems: tuple[str, ...]


def find_companions(request: ModelRequest, root: Path, variant: str) -> Companions:
    """Find the encoders that a variant needs: where the request says, else in and near `root`.

    Every file is opened once, so that damage is reported now rather than when its turn comes.
    """
    problems: list[str] = []
    vae = _component(_VAE_2_2 if variant == "wan2.2-ti2v-5b" else _VAE_2_1, request.vae, root, problems)
    text_encoder = _component(_TEXT, request.text_encoder, root, problems)
    image_encoder = None
    if needs_image_encoder(variant):
        image_encoder = _component(_IMAGE, request.image_encoder, root, problems)
    return Companions(
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=_tokenizer(request.tokenizer, text_encoder, root, problems),
        image_encoder=image_encoder,
        problems=tuple(problems),
    )


def _component(kind: _Kind, given: str | None, root: Path, problems: list[str]) -> Component | None:
    if given is not None:
        path = Path(given).expanduser()
        component = _given(kind, path)
        if component is None:
            what = f"holds no {kind.title}" if path.exists() else "no such file or folder"
            problems.append(f"model.{kind.option} = '{given}': {what}")
    else:
        component = _nearby(kind, root)
        if component is None:
            missing = f"{root}: the {kind.title} is missing (for example {kind.example}"
            problems.append(f"{missing}, or {kind.folder}/); put it there or set model.{kind.option}")
    if component is not None:
        problems.extend(_damage(component))
    return component


def _given(kind: _Kind, path: Path) -> Component | None:
    if path.is_file():
        return _of_file(path) if path.name.endswith(SUFFIXES) else None
    return _in_folder(kind, path) or _of_folder(path)


def _nearby(kind: _Kind, root: Path) -> Component | None:
    found = _in_folder(kind, root)
    if found is not None:
        return found
    folders = [level / name for level in _levels(root) for name in kind.comfyui_folders]
    return _best(kind, [file for folder in folders for file in folder.rglob("*")])


def _levels(root: Path) -> Iterator[Path]:
    yield root / "models"
    yield root
    yield from root.absolute().parents[:_LEVELS_UP]


def _in_folder(kind: _Kind, folder: Path) -> Component | None:
    return _of_folder(folder / kind.folder) or _best(kind, folder.glob("*"))


def _best(kind: _Kind, files: Iterable[Path]) -> Component | None:
    """Choose by name among several: fp8 last, then the plainest name."""
    named = [file for file in files if file.name.endswith(SUFFIXES) and _matches(kind, file)]
    named.sort(key=lambda file: ("fp8" in file.name.lower(), len(file.name), file.name))
    return _of_file(named[0]) if named else None


def _matches(kind: _Kind, file: Path) -> bool:
    return re.search(kind.pattern, file.name.lower()) is not None


def _of_folder(folder: Path) -> Component | None:
    config = folder / "config.json"
    files = weight_files(folder) if config.is_file() else ()
    return Component(files=files, layout="diffusers", config=read_json(config)) if files else None


def _of_file(path: Path) -> Component:
    if (path.parent / "config.json").is_file() and path.name.startswith(
        ("diffusion_pytorch_model", "model.")
    ):
        return Component(files=(path,), layout="diffusers", config=read_json(path.parent / "config.json"))
    layout: Layout = "native" if path.suffix in PICKLE_SUFFIXES else "comfyui"
    return Component(files=(path,), layout=layout)


def _damage(component: Component) -> tuple[str, ...]:
    try:
        TensorFiles(*component.files).close()
    except UserError as error:
        return error.problems
    return ()


def _tokenizer(
    given: str | None, text_encoder: Component | None, root: Path, problems: list[str]
) -> Path | None:
    if given is not None:
        path = Path(given).expanduser()
        found = _tokenizer_at(path)
        if found is None:
            what = (
                f"holds neither {' nor '.join(TOKENIZER_FILES)}"
                if path.exists()
                else "no such file or folder"
            )
            problems.append(f"model.tokenizer = '{given}': {what}")
        return found
    near = [file.parent for file in text_encoder.files] if text_encoder else []
    places = [root, *near, *(folder.parent for folder in near), *(text_encoder.files if text_encoder else ())]
    for place in places:
        found = _tokenizer_at(place)
        if found is not None:
            return found
    problems.append(f"{root}: the tokenizer is missing (google/umt5-xxl/ or tokenizer/); set model.tokenizer")
    return None


def _tokenizer_at(path: Path) -> Path | None:
    """Return a tokenizer's folder, or a safetensors file that embeds a sentencepiece model."""
    if path.is_file():
        if path.name in TOKENIZER_FILES:
            return path.parent
        return path if path.suffix == ".safetensors" and _embeds_tokenizer(path) else None
    for folder in (path, *(path / name for name in _TOKENIZER_FOLDERS)):
        if any((folder / name).is_file() for name in TOKENIZER_FILES):
            return folder
    return None


def _embeds_tokenizer(path: Path) -> bool:
    try:
        with TensorFiles(path) as files:
            return _EMBEDDED_TOKENIZER in files.names
    except UserError:  # reported as the text encoder's damage
        return False
