"""The networks beside a transformer, and the tokenizer: where they are, in each layout.

They are where the request says, else in or near the transformer's folder: in diffusers' folders, beside it
under the names that their authors gave them, or in ComfyUI's sibling folders.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from tworeel.errors import UserError
from tworeel.models.family import Component, Layout
from tworeel.models.network_files import read_json, weight_files
from tworeel.weights.tensor_files import PICKLE_SUFFIXES, SUFFIXES, TensorFiles

_LEVELS_UP = 3  # from a transformer in a subfolder of ComfyUI's models/diffusion_models up to models/


@dataclass(frozen=True, kw_only=True)
class Kind:
    """How one network is called, in each layout."""

    option: str
    """Of `model`: where the user says it is."""
    title: str
    folder: str
    """In diffusers' layout."""
    comfyui_folders: tuple[str, ...]
    pattern: str
    """Of a single file's name, in lower case."""
    example: str
    is_one: Callable[[Iterable[str]], bool] = lambda names: True
    """Tell by a file's keys whether it is this network, where names alone may mislead."""


@dataclass(frozen=True, kw_only=True)
class TokenizerKind:
    """How a tokenizer is kept."""

    files: tuple[str, ...]
    """One of these makes a folder a tokenizer's."""
    folders: tuple[str, ...]
    """Where it may lie in a model's folder."""
    embedded: str
    """Key of the tensor that holds it in ComfyUI's text encoder file."""
    example: str


def find_component(kind: Kind, given: str | None, root: Path, problems: list[str]) -> Component | None:
    """Find a network; what is wrong is added to `problems`.

    Its files are opened once, so that damage is reported now rather than when its turn comes.
    """
    component = _found(kind, given, root)
    if component is not None:
        problems.extend(_damage(component))
    elif given is not None:
        what = f"holds no {kind.title}" if Path(given).expanduser().exists() else "no such file or folder"
        problems.append(f"model.{kind.option} = '{given}': {what}")
    else:
        missing = f"{root}: the {kind.title} is missing (for example {kind.example}"
        problems.append(f"{missing}, or {kind.folder}/); put it there or set model.{kind.option}")
    return component


def damage_of(kind: Kind, given: str | None, root: Path) -> tuple[str, ...]:
    """What of a network's files is damaged, if there are any."""
    component = _found(kind, given, root)
    return () if component is None else _damage(component)


def find_tokenizer(
    kind: TokenizerKind, given: str | None, text_encoder: Component | None, root: Path, problems: list[str]
) -> Path | None:
    """Find a tokenizer's folder, or a file that embeds it; what is wrong is added to `problems`."""
    if given is not None:
        path = Path(given).expanduser()
        found = _tokenizer_at(kind, path)
        if found is None:
            what = f"holds neither {' nor '.join(kind.files)}" if path.exists() else "no such file or folder"
            problems.append(f"model.tokenizer = '{given}': {what}")
        return found
    for place in _tokenizer_places(text_encoder, root):
        found = _tokenizer_at(kind, place)
        if found is not None:
            return found
    problems.append(f"{root}: the tokenizer is missing ({kind.example}); set model.tokenizer")
    return None


def _found(kind: Kind, given: str | None, root: Path) -> Component | None:
    return _nearby(kind, root) if given is None else _given(kind, Path(given).expanduser())


def _given(kind: Kind, path: Path) -> Component | None:
    if path.is_file():
        return _of_file(path) if path.name.endswith(SUFFIXES) and _is_one(kind, path) else None
    return _in_folder(kind, path) or _of_folder(path)


def _nearby(kind: Kind, root: Path) -> Component | None:
    found = _in_folder(kind, root)
    if found is not None:
        return found
    folders = [level / name for level in _levels(root) for name in kind.comfyui_folders]
    return _best(kind, [file for folder in folders for file in folder.rglob("*")])


def _levels(root: Path) -> Iterator[Path]:
    yield root / "models"
    yield root
    yield from root.absolute().parents[:_LEVELS_UP]


def _in_folder(kind: Kind, folder: Path) -> Component | None:
    return _of_folder(folder / kind.folder) or _best(kind, folder.glob("*"))


def _best(kind: Kind, files: Iterable[Path]) -> Component | None:
    """Choose by name among several: fp8 last, then the plainest name."""
    named = [file for file in files if file.name.endswith(SUFFIXES) and _matches(kind, file)]
    named.sort(key=lambda file: ("fp8" in file.name.lower(), len(file.name), file.name))
    fitting = (file for file in named if _is_one(kind, file))
    return next((_of_file(file) for file in fitting), None)


def _matches(kind: Kind, file: Path) -> bool:
    return re.search(kind.pattern, file.name.lower()) is not None


def _is_one(kind: Kind, file: Path) -> bool:
    try:
        with TensorFiles(file) as files:
            return kind.is_one(files.names)
    except UserError:  # reported as this network's damage
        return True


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


def _tokenizer_places(text_encoder: Component | None, root: Path) -> Sequence[Path]:
    files = text_encoder.files if text_encoder else ()
    near = [file.parent for file in files]
    return [root, *near, *(folder.parent for folder in near), *files]


def _tokenizer_at(kind: TokenizerKind, path: Path) -> Path | None:
    """Return a tokenizer's folder, or a safetensors file that embeds one."""
    if path.is_file():
        if path.name in kind.files:
            return path.parent
        return path if path.suffix == ".safetensors" and _embeds(kind, path) else None
    for folder in (path, *(path / name for name in kind.folders)):
        if any((folder / name).is_file() for name in kind.files):
            return folder
    return None


def _embeds(kind: TokenizerKind, path: Path) -> bool:
    try:
        with TensorFiles(path) as files:
            return kind.embedded in files.names
    except UserError:  # reported as the text encoder's damage
        return False
