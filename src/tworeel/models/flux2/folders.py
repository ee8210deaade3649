"""Where the transformer lies, for a path in any of the layouts that FLUX.2 checkpoints come in."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from tworeel.errors import UserError, raise_if_any
from tworeel.models.family import Layout
from tworeel.models.flux2.keys import parameter_name
from tworeel.models.flux2.variants import (
    SUPPORTED,
    Shapes,
    is_flux1,
    is_flux2,
    refuse_pipeline,
    says_base,
)
from tworeel.models.network_files import (
    all_shards,
    comfyui_transformers,
    is_standard,
    read_json,
    weight_files,
)
from tworeel.weights.rows import shapes_by_name
from tworeel.weights.tensor_files import SUFFIXES, TensorFiles

_CLASS = "Flux2Transformer2DModel"


@dataclass(frozen=True, kw_only=True)
class Found:
    """What was found at a path."""

    root: Path
    """The folder in or near which the encoders lie."""
    files: tuple[Path, ...]
    layout: Layout
    config: Mapping[str, Any] = field(default_factory=dict)
    is_base: bool = False
    """Whether its files or folders say that it is not distilled."""


def find_transformer(path: Path) -> Found | None:
    """Find the transformer at a folder or a file; None if nothing looks like FLUX.

    Raises:
        UserError: it is a FLUX model of a kind that is not supported, several files may be meant, or the only
            files that there are cannot be read.
    """
    found = _at_file(path) if path.is_file() else _at_folder(path.absolute())
    if found is None:
        return None
    try:
        files = TensorFiles(*found.files)
    except UserError:
        if found.config.get("_class_name") == _CLASS:
            return found  # told with all else that is damaged, when its shapes are read
        raise
    with files:
        if is_flux2(shapes_of(files, found.layout)):
            return found
        if is_flux1(files.names):
            raise UserError(f"{files}: a FLUX.1 model, which is not supported; supported are {SUPPORTED}")
    return None


def shapes_of(files: TensorFiles, layout: Layout) -> Shapes:
    """Return shapes by parameter name, in diffusers' spelling."""
    return shapes_by_name(files.names, partial(parameter_name, layout))


def _at_file(path: Path) -> Found | None:
    if path.name in ("model_index.json", "config.json"):
        return _at_folder(path.absolute().parent)
    if not path.name.endswith(SUFFIXES):
        return None
    if is_standard(path) and (path.parent / "config.json").is_file():
        return _at_folder(path.absolute().parent)
    return _single(path)


def _at_folder(folder: Path) -> Found | None:
    if (folder / "model_index.json").is_file() or _is_ours(folder / "transformer"):
        return _diffusers(folder)
    if folder.name == "transformer" and _is_ours(folder):
        return _diffusers(folder.parent)
    if (folder / "config.json").is_file() and weight_files(folder):
        return _network(folder, root=folder)
    return _flat(folder)


def _diffusers(root: Path) -> Found | None:
    index = read_json(root / "model_index.json")
    class_name = str(index.get("_class_name", "Flux2Pipeline"))
    if not class_name.startswith("Flux"):
        return None
    refuse_pipeline(str(root), class_name)
    if not weight_files(root / "transformer"):
        raise UserError(f"{root}: holds no weights in transformer/")
    distilled = index.get("is_distilled")
    return _network(
        root / "transformer", root, says_base(root / "transformer") if distilled is None else not distilled
    )


def _network(folder: Path, root: Path, is_base: bool = False) -> Found:
    return Found(
        root=root,
        files=weight_files(folder),
        layout="diffusers",
        config=read_json(folder / "config.json"),
        is_base=is_base,
    )


def _flat(folder: Path) -> Found | None:
    """The one file of a FLUX.2 transformer in a flat folder or in ComfyUI's own."""
    files, problems = comfyui_transformers(folder, lambda tensors: is_flux2(shapes_of(tensors, "comfyui")))
    if len(files) > 1:
        names = ", ".join(file.name for file in files)
        raise UserError(f"model.path: several transformers fit ({names}); give the path of one file")
    if files:
        return _single(files[0], root=folder)
    raise_if_any(problems)
    old, _ = comfyui_transformers(folder, lambda tensors: is_flux1(tensors.names))
    return _single(old[0]) if old else None


def _single(path: Path, root: Path | None = None) -> Found:
    return Found(root=root or path.parent, files=all_shards(path), layout="comfyui", is_base=says_base(path))


def _is_ours(folder: Path) -> bool:
    return read_json(folder / "config.json").get("_class_name") == _CLASS
