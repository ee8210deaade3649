"""Decodes latents and writes them: a PNG or MP4 for each take, and the contact sheet."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image
from torch import Tensor

from tworeel.data.writing import write_video
from tworeel.files import write_atomic
from tworeel.models.family import LatentDecoder
from tworeel.sampling.contact_sheet import cell_of, contact_sheet
from tworeel.sampling.rendering import Take

SHEET = "contact-sheet.png"


@dataclass(frozen=True, kw_only=True)
class Sheet:
    """What was written."""

    path: Path
    """The contact sheet; the takes lie beside it."""
    takes: tuple[Path, ...]


def write_takes(
    folder: Path,
    prompts: Sequence[str],
    takes: Sequence[Take],
    latents: Sequence[Tensor],
    decoder: LatentDecoder,
    frame_rate: float,
    done: Callable[[], None] = lambda: None,
) -> Sheet:
    """Decode takes one by one, and write each and all of them.

    Args:
        folder: of the files; it is made, and what lies in it under the same names is replaced.
        prompts: by row.
        takes: row by row.
        latents: of the takes, in the same order.
        decoder: of the latents.
        frame_rate: frames a second of videos.
        done: called after each take.
    """
    folder.mkdir(parents=True, exist_ok=True)
    paths: list[Path] = []
    rows: list[list[Image.Image]] = [[] for _ in prompts]
    for take, latent in zip(takes, latents, strict=True):
        frames = decoder.decode(latent, take.picture).numpy()
        rows[take.row].append(cell_of(frames))
        stem = f"prompt-{take.row + 1:02d}-strength-{take.strength:g}"
        paths.append(_write(folder, stem, frames, frame_rate))
        done()
    columns = [f"strength {take.strength:g}" for take in takes[: len(rows[0])]]
    sheet = contact_sheet(prompts, columns, rows)
    write_atomic(folder / SHEET, lambda path: sheet.save(path))
    return Sheet(path=folder / SHEET, takes=tuple(paths))


def _write(folder: Path, stem: str, frames: np.ndarray, frame_rate: float) -> Path:
    if len(frames) == 1:
        path = folder / f"{stem}.png"
        write_atomic(path, lambda temporary: Image.fromarray(frames[0]).save(temporary))
    else:
        path = folder / f"{stem}.mp4"
        pictures = map(Image.fromarray, frames)
        write_atomic(path, lambda temporary: write_video(temporary, pictures, frame_rate))
    return path
