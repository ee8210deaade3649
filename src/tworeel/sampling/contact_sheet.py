"""All previews on one picture: a row for each prompt, a column for each strength."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

IMAGE_SIDE = 384
"""Longest side of an image on the sheet, in pixels."""
FRAME_SIDE = 240
"""The same for each of a video's frames."""
SHOWN_FRAMES = 3
"""Of a video: its first, its last and one between."""
_GAP = 8
_LINE = 20
_PAPER, _INK = (250, 250, 250), (20, 20, 20)


def cell_of(frames: np.ndarray) -> Image.Image:
    """Make a cell of uint8 frames, (frames, height, width, 3): an image, or a strip of a few frames."""
    count = min(SHOWN_FRAMES, len(frames))
    shown = [round(k * (len(frames) - 1) / max(1, count - 1)) for k in range(count)]
    pictures = [Image.fromarray(frames[number]) for number in shown]
    for picture in pictures:
        side = IMAGE_SIDE if count == 1 else FRAME_SIDE
        picture.thumbnail((side, side), Image.Resampling.LANCZOS)
    width, height = pictures[0].size
    strip = Image.new("RGB", (count * width, height))
    for number, picture in enumerate(pictures):
        strip.paste(picture, (number * width, 0))
    return strip


def contact_sheet(
    prompts: Sequence[str], columns: Sequence[str], cells: Sequence[Sequence[Image.Image]]
) -> Image.Image:
    """Put the cells side by side.

    Args:
        prompts: one above each row.
        columns: what stands above each column.
        cells: by row and column, all of one size.
    """
    width, height = cells[0][0].size
    font = ImageFont.load_default(size=14)
    total = _GAP + len(columns) * (width + _GAP)
    texts = [_wrapped(prompt, total - 2 * _GAP, font) for prompt in prompts]
    heights = [_LINE * len(lines) + height + 2 * _GAP for lines in texts]
    sheet = Image.new("RGB", (total, 2 * _GAP + _LINE + sum(heights)), _PAPER)
    pen = ImageDraw.Draw(sheet)
    for number, column in enumerate(columns):
        pen.text((_GAP + number * (width + _GAP), _GAP), column, _INK, font)
    top = 2 * _GAP + _LINE
    for lines, row, row_height in zip(texts, cells, heights, strict=True):
        for number, line in enumerate(lines):
            pen.text((_GAP, top + number * _LINE), line, _INK, font)
        for number, cell in enumerate(row):
            sheet.paste(cell, (_GAP + number * (width + _GAP), top + _LINE * len(lines)))
        top += row_height
    return sheet


def _wrapped(text: str, width: int, font: ImageFont.FreeTypeFont | ImageFont.ImageFont) -> list[str]:
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if lines[-1] and font.getlength(longer) > width:
            lines.append(word)
        else:
            lines[-1] = longer
    return lines
