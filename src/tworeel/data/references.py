"""Reference images: pictures of any size that an edit model is shown beside the caption.

Tables name them in one column, with a path or a JSON list of paths, or in numbered columns. They are fitted
as diffusers does for inference: a large one is made smaller with Lanczos' filter, then the centre is cut to
whole tokens.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from tworeel.data.errors import BrokenRow, MediaError
from tworeel.data.media import iter_frames, probe
from tworeel.data.tables import Row
from tworeel.models.family import Traits

COLUMNS = ("reference_image", "reference_images", "edit_image", "control_path")
"""Names of the column; each may also be numbered (`control_path_0`, `control_path_1`)."""
MIN_SIDE = 64
MAX_ASPECT = 8
"""Smaller and longer ones than these the authors' code refuses too."""

_NUMBERED = re.compile(rf"({'|'.join(COLUMNS)})_(\d+)")


@dataclass(frozen=True)
class Reference:
    """A reference image, and how it is fitted: made smaller to `scaled`, then cut to `width` × `height`."""

    path: Path
    scaled: tuple[int, int]
    """Width and height."""
    width: int
    height: int


def reference_paths(row: Row) -> list[str]:
    """Return the paths of a row's reference images, in their order.

    Raises:
        BrokenRow: several columns that mean the same, or a list that is not one.
    """
    named = {name: _listed(row, name) for name in COLUMNS if row.values.get(name) or row.lists.get(name)}
    numbered: dict[str, dict[int, str]] = {}
    for name, value in row.values.items():
        match = _NUMBERED.fullmatch(name)
        if match and value:
            numbered.setdefault(match[1], {})[int(match[2])] = value
    found = [*named, *(f"{name}_0, …" for name in numbered)]
    if len(found) > 1:
        raise BrokenRow(f"{' and '.join(found)} are both given and mean the same: keep one")
    for places in numbered.values():
        return [places[number] for number in sorted(places)]
    return next(iter(named.values()), [])


def fit_reference(path: Path, width: int, height: int, traits: Traits) -> Reference | str:
    """Decide how a reference image of this size is fitted; a line that says why it cannot be."""
    if min(width, height) < MIN_SIDE or max(width, height) > MAX_ASPECT * min(width, height):
        return (
            f"{path}: a reference image of {width}x{height} pixels; both sides must have at least "
            f"{MIN_SIDE}, and the longer one at most {MAX_ASPECT} times as many as the other"
        )
    scale = min(1.0, math.sqrt(traits.reference_area / (width * height)))
    scaled = (int(width * scale), int(height * scale)) if scale < 1 else (width, height)
    multiple = traits.spatial_multiple
    return Reference(path, scaled, scaled[0] // multiple * multiple, scaled[1] // multiple * multiple)


def fit_references(paths: Sequence[Path], traits: Traits, broken: list[str]) -> tuple[Reference, ...]:
    """Decide how a clip's reference images are fitted; what is wrong is added to `broken`.

    A model that takes none is shown none.
    """
    if not traits.reference_images:
        return ()
    if len(paths) > traits.reference_images:
        most = f"{traits.variant} takes at most {traits.reference_images}"
        broken.append(f"{paths[0]}: the first of {len(paths)} reference images; {most}")
    fitted: list[Reference] = []
    for path in paths:
        found = _fitted(path, traits)
        if isinstance(found, Reference):
            fitted.append(found)
        else:
            broken.extend(found)
    return tuple(fitted)


def image_problems(path: Path) -> tuple[str, ...]:
    """Say why a condition or reference image cannot be used."""
    try:
        if not probe(path).is_image:
            return (f"{path}: a condition or reference image must be an image, not a video",)
    except MediaError as error:
        return error.problems
    return ()


def _fitted(path: Path, traits: Traits) -> Reference | tuple[str, ...]:
    problems = image_problems(path)
    if problems:
        return problems
    info = probe(path)
    found = fit_reference(path, info.width, info.height, traits)
    return found if isinstance(found, Reference) else (found,)


def load_reference(reference: Reference) -> Tensor:
    """Read a reference image: uint8 RGB, shape (3, height, width)."""
    [(_, picture)] = iter_frames(reference.path, (0,))
    image = Image.fromarray(np.ascontiguousarray(picture))
    if image.size != reference.scaled:
        image = image.resize(reference.scaled, Image.Resampling.LANCZOS)
    left = (image.width - reference.width) // 2
    top = (image.height - reference.height) // 2
    cut = image.crop((left, top, left + reference.width, top + reference.height))
    return torch.from_numpy(np.array(cut)).permute(2, 0, 1).contiguous()


def _listed(row: Row, name: str) -> list[str]:
    if name in row.lists:
        return [path for path in row.lists[name] if path]
    value = row.values[name]
    if not value.startswith("["):
        return [value]
    try:
        paths = json.loads(value)
    except (json.JSONDecodeError, RecursionError):
        paths = None
    if not isinstance(paths, list) or not all(isinstance(path, str) for path in paths):
        raise BrokenRow(f"{name} is not a JSON list of paths: {value[:60]}")
    return [path.strip() for path in paths if path.strip()]
