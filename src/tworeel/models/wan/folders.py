"""Where the transformer lies, for a path in any of the layouts that Wan checkpoints come in.

Nothing but names, `config.json` and headers is looked at, and nothing is decided yet: a model of two experts
has two candidates.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tworeel.errors import UserError, raise_if_any
from tworeel.models.family import Layout
from tworeel.models.network_files import (
    all_shards,
    comfyui_transformers,
    is_standard,
    read_json,
    weight_files,
)
from tworeel.models.wan.keys import is_native_key, parameter_name
from tworeel.models.wan.variants import EXPERTS, Shapes, expert_in_name, is_wan
from tworeel.weights.tensor_files import SUFFIXES, TensorFiles

_OF_2_1 = re.compile(r"wan[-_ ]?2[._]1")


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """A transformer that the path may mean."""

    files: tuple[Path, ...]
    layout: Layout
    expert: str | None = None
    """What its folder or file name says."""
    config: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Found:
    """What was found at a path."""

    root: Path
    """The folder in or near which the encoders lie."""
    candidates: tuple[Candidate, ...]
    pointed: str | None = None
    """The expert that the path itself points at."""


def find_transformers(path: Path) -> Found | None:
    """Find the transformers at a folder or a file; None if nothing looks like one.

    Raises:
        UserError: the only files that there are cannot be read.
    """
    return _at_file(path) if path.is_file() else _at_folder(path)


def shapes_of(files: TensorFiles, layout: Layout) -> dict[str, tuple[int, ...]]:
    """Return shapes by parameter name, in diffusers' spelling."""
    named = ((parameter_name(layout, key), info.shape) for key, info in files.names.items())
    return {name: shape for name, shape in named if name is not None}


def _at_file(path: Path) -> Found | None:
    if path.name in ("model_index.json", "config.json"):
        return _at_folder(path.parent)
    if not path.name.endswith(SUFFIXES):
        return None
    if is_standard(path) and (path.parent / "config.json").is_file():
        return _at_folder(path.parent)
    expert = _expert_of(path)
    candidate = Candidate(files=all_shards(path), layout="comfyui", expert=expert)
    return Found(root=path.parent, candidates=(candidate,), pointed=expert)


def _at_folder(folder: Path) -> Found | None:
    folder = folder.absolute()
    if (folder / "model_index.json").is_file() or _is_wan_config(folder / "transformer"):
        return _diffusers(folder, None)
    if folder.name in ("transformer", "transformer_2") and _is_wan_config(folder):
        return _diffusers(folder.parent, folder.name)
    if folder.name in _expert_folders():
        return _native_experts(folder.parent, _expert_folders()[folder.name])
    if any((folder / name).is_dir() for name in _expert_folders()):
        return _native_experts(folder, None)
    if (folder / "config.json").is_file() and weight_files(folder):
        return _network_folder(folder)
    return _comfyui_folder(folder)


def _diffusers(root: Path, pointed: str | None) -> Found | None:
    index = read_json(root / "model_index.json")
    if not str(index.get("_class_name", "Wan")).startswith("Wan"):
        return None
    has_experts = bool(index.get("boundary_ratio")) or (root / "transformer_2").is_dir()
    experts = {"transformer": "high" if has_experts else None, "transformer_2": "low"}
    candidates = tuple(
        Candidate(
            files=weight_files(root / name),
            layout="diffusers",
            expert=expert,
            config=read_json(root / name / "config.json"),
        )
        for name, expert in experts.items()
        if weight_files(root / name)
    )
    if not candidates:
        raise UserError(f"{root}: holds no weights in transformer/")
    return Found(root=root, candidates=candidates, pointed=experts[pointed] if pointed else None)


def _native_experts(root: Path, pointed: str | None) -> Found | None:
    candidates = tuple(
        Candidate(
            files=weight_files(root / name),
            layout="native",
            expert=expert,
            config=read_json(root / name / "config.json"),
        )
        for name, expert in _expert_folders().items()
        if weight_files(root / name)
    )
    if not candidates:
        raise UserError(f"{root}: holds no weights in {' or '.join(_expert_folders())}")
    return Found(root=root, candidates=candidates, pointed=pointed)


def _network_folder(folder: Path) -> Found:
    """A folder of one network: Wan's own repository, or diffusers' transformer folder by itself."""
    files = weight_files(folder)
    candidate = Candidate(
        files=files,
        layout=_layout_by_keys(files),
        expert=_expert_of(folder),
        config=read_json(folder / "config.json"),
    )
    return Found(root=folder, candidates=(candidate,), pointed=candidate.expert)


def _layout_by_keys(files: Sequence[Path]) -> Layout:
    try:
        with TensorFiles(*files) as tensors:
            return "native" if any(map(is_native_key, tensors.names)) else "diffusers"
    except UserError:  # told with all else that is damaged, when its shapes are read
        return "native"


def _comfyui_folder(folder: Path) -> Found | None:
    """Every file of a Wan transformer in a flat folder or in ComfyUI's own."""
    files, problems = comfyui_transformers(folder, lambda tensors: is_wan(_comfyui_shapes(tensors)))
    candidates = tuple(Candidate(files=(f,), layout="comfyui", expert=_expert_of(f)) for f in files)
    if not candidates:
        raise_if_any(problems)
        return None
    return Found(root=folder, candidates=candidates)


def _comfyui_shapes(tensors: TensorFiles) -> Shapes:
    return shapes_of(tensors, "comfyui")


def _expert_folders() -> dict[str, str]:
    return {f"{expert}_noise_model": expert for expert in EXPERTS}


def _expert_of(path: Path) -> str | None:
    # "low" in the name of a 2.1 file means something else: it has no experts.
    return None if says_2_1(path) else expert_in_name(path.name)


def says_2_1(path: Path) -> bool:
    """Tell whether a file's or its folder's name says Wan 2.1, which has no experts."""
    return any(_OF_2_1.search(name.lower()) for name in (path.name, path.parent.name))


def _is_wan_config(folder: Path) -> bool:
    return str(read_json(folder / "config.json").get("_class_name", "")).startswith("Wan")
