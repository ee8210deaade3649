"""Draws small datasets: shapes over a gradient, as video files with captions or as pairs of images."""

from __future__ import annotations

import json
import random
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from tworeel.data.writing import write_video

COLOURS = {
    "red": (214, 48, 49),
    "green": (39, 174, 96),
    "blue": (41, 98, 255),
    "yellow": (241, 196, 15),
    "white": (240, 240, 240),
}
SHAPES = ("circle", "square", "triangle")
WAYS = {"left to right": (1, 0), "top to bottom": (0, 1), "corner to corner": (1, 1)}
# (width, height, frames, frames a second)
FORMATS = (
    (160, 96, 24, 16),
    (96, 144, 30, 24),
    (128, 128, 20, 16),
    (144, 96, 45, 30),
    (112, 160, 18, 12),
    (160, 112, 40, 25),
)


def write_clips(folder: Path, count: int = 6, seed: int = 0) -> list[Path]:
    """Write `count` short clips and one image, each with a `.txt` caption; the same ones for the same seed.

    The clips are H.264 `.mp4` files of about 96 to 160 pixels and one to two seconds, of different aspect
    ratios, lengths and frame rates. Returns the paths of the media files.
    """
    folder.mkdir(parents=True, exist_ok=True)
    rng = random.Random(seed)
    paths = [_write_video(folder / f"clip_{k}.mp4", FORMATS[k % len(FORMATS)], rng) for k in range(count)]
    return [*paths, _write_image(folder / "image.png", rng)]


def write_edits(folder: Path, count: int = 5, seed: int = 0) -> list[Path]:
    """Write `count` edited images beside what they were made of, and `metadata.jsonl`, which pairs them.

    Each is a shape on a gradient; its reference image is the gradient alone. Returns the paths of the images
    that are trained on.
    """
    folder.mkdir(parents=True, exist_ok=True)
    rng = random.Random(seed)
    rows = [_write_edit(folder, k, rng) for k in range(count)]
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (folder / "metadata.jsonl").write_text(lines, encoding="utf-8")
    return [folder / row["path"] for row in rows]


def _write_edit(folder: Path, number: int, rng: random.Random) -> dict[str, str]:
    width, height, _, _ = FORMATS[number % len(FORMATS)]
    colour, shape = rng.choice(list(COLOURS)), rng.choice(SHAPES)
    before = _gradient(width, height, rng)
    row = {
        "path": f"image_{number}.png",
        "caption": f"Put a {colour} {shape} on it.",
        "edit_image": f"before_{number}.png",
    }
    before.save(folder / row["edit_image"])
    _draw(before, shape, colour, (1, 1), 0.5).save(folder / row["path"])
    return row


def _write_video(path: Path, form: tuple[int, int, int, int], rng: random.Random) -> Path:
    width, height, frames, rate = form
    colour, shape, way = rng.choice(list(COLOURS)), rng.choice(SHAPES), rng.choice(list(WAYS))
    background = _gradient(width, height, rng)
    pictures = (_draw(background, shape, colour, WAYS[way], k / (frames - 1)) for k in range(frames))
    write_video(path, pictures, rate, quantizer=22)
    return _write_caption(path, f"A {colour} {shape} moves from {way} over a soft gradient.")


def _write_image(path: Path, rng: random.Random) -> Path:
    colour, shape = rng.choice(list(COLOURS)), rng.choice(SHAPES)
    _draw(_gradient(144, 112, rng), shape, colour, (1, 1), 0.5).save(path)
    return _write_caption(path, f"A {colour} {shape} on a soft gradient.")


def _write_caption(path: Path, caption: str) -> Path:
    path.with_suffix(".txt").write_text(caption + "\n", encoding="utf-8")
    return path


def _gradient(width: int, height: int, rng: random.Random) -> Image.Image:
    """A gradient between two dark colours, from the left to the right and slightly downwards."""
    first, second = (np.array([rng.randrange(20, 120) for _ in range(3)]) for _ in range(2))
    across = np.linspace(0, 0.7, width)[None, :, None] + np.linspace(0, 0.3, height)[:, None, None]
    return Image.fromarray((first + (second - first) * across).astype(np.uint8))


def _draw(
    background: Image.Image, shape: str, colour: str, way: tuple[int, int], progress: float
) -> Image.Image:
    """Draw a shape on its way, `progress` from 0 to 1; it stays inside of the picture."""
    picture = background.copy()
    size = min(picture.size) // 3
    room = (picture.width - size, picture.height - size)
    left, top = (room[axis] * (progress if way[axis] else 0.5) for axis in (0, 1))
    box = (left, top, left + size, top + size)
    pen = ImageDraw.Draw(picture)
    if shape == "circle":
        pen.ellipse(box, fill=COLOURS[colour])
    elif shape == "square":
        pen.rectangle(box, fill=COLOURS[colour])
    else:
        pen.polygon([(left, top + size), (left + size / 2, top), (left + size, top + size)], COLOURS[colour])
    return picture
