"""The files of one network: a `config.json`, and weights in one file or in numbered shards."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tworeel.errors import UserError
from tworeel.weights.tensor_files import INDEX_SUFFIX, PICKLE_SUFFIXES, TensorFiles

COMFYUI_TRANSFORMERS = ("diffusion_models", "unet", "models/diffusion_models", "models/unet")

_STANDARD_STEMS = ("diffusion_pytorch_model", "model", "pytorch_model")
_SHARD = re.compile(r"(.+)-\d{5}-of-(\d{5})(\.\w+)")


def read_json(path: Path) -> dict[str, Any]:
    """Read a table from a JSON file; empty if there is no such file.

    Raises:
        UserError: the file is not a table in JSON.
    """
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path}: not readable as JSON ({error})") from None
    if not isinstance(content, dict):
        raise UserError(f"{path}: is not a table")
    return content


def weight_files(folder: Path) -> tuple[Path, ...]:
    """Return the weights in a network's folder: an index, a single file or numbered shards; () if none.

    Missing shards are returned too: opening them says that they are missing.
    """
    for suffix in (INDEX_SUFFIX, ".safetensors", *PICKLE_SUFFIXES):
        files = sorted(folder.glob(f"*{suffix}"), key=lambda path: (not is_standard(path), path.name))
        if files:
            return all_shards(files[0])
    return ()


def comfyui_transformers(folder: Path, is_one: Callable[[TensorFiles], bool]) -> tuple[list[Path], list[str]]:
    """Look for transformers in a flat folder and in ComfyUI's own: their files, and what cannot be read."""
    places = [folder, *(folder / name for name in COMFYUI_TRANSFORMERS)]
    found: list[Path] = []
    problems: list[str] = []
    for file in sorted(file for place in places for file in place.glob("*.safetensors")):
        try:
            with TensorFiles(file) as tensors:
                if is_one(tensors):
                    found.append(file)
        except UserError as error:
            problems.extend(error.problems)
    return found, problems


def is_standard(path: Path) -> bool:
    """Tell whether a file has the name that libraries give to a network's weights."""
    stem = path.name.removesuffix(INDEX_SUFFIX).removesuffix(path.suffix)
    shard = _SHARD.fullmatch(path.name)
    return (shard[1] if shard else stem) in _STANDARD_STEMS


def all_shards(path: Path) -> tuple[Path, ...]:
    """Return the file, or all the shards that its name counts."""
    shard = _SHARD.fullmatch(path.name)
    if not shard:
        return (path,)
    stem, count, suffix = shard.groups()
    return tuple(path.with_name(f"{stem}-{n:05d}-of-{count}{suffix}") for n in range(1, int(count) + 1))
