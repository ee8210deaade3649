from __future__ import annotations

import numpy as np
from PIL import Image

from tworeel.sampling.contact_sheet import FRAME_SIDE, IMAGE_SIDE, cell_of, contact_sheet


def frames(count: int, width: int, height: int) -> np.ndarray:
    """Each frame has a grey of its own."""
    return np.stack([np.full((height, width, 3), 20 * k, dtype=np.uint8) for k in range(count)])


def test_a_video_is_shown_by_its_first_middle_and_last_frame() -> None:
    cell = cell_of(frames(9, 480, 240))
    assert cell.size == (3 * FRAME_SIDE, FRAME_SIDE // 2)
    assert [cell.getpixel((FRAME_SIDE * k + 50, 50))[0] for k in range(3)] == [0, 80, 160]


def test_an_image_is_shown_once_and_never_enlarged() -> None:
    assert cell_of(frames(1, 1000, 500)).size == (IMAGE_SIDE, IMAGE_SIDE // 2)
    assert cell_of(frames(1, 64, 32)).size == (64, 32)


def test_rows_are_prompts_and_columns_are_strengths() -> None:
    colours = [(200, 0, 0), (0, 200, 0), (0, 0, 200), (90, 90, 0)]
    pictures = [Image.new("RGB", (120, 80), colour) for colour in colours]
    cells = [pictures[:2], pictures[2:]]
    sheet = contact_sheet(["a short prompt", "a long prompt " * 12], ["strength 0", "strength 1"], cells)
    order = list(dict.fromkeys(sheet.getpixel((x, y)) for y in range(sheet.height) for x in (60, 190)))
    assert [colour for colour in order if colour in colours] == colours
    assert sheet.width < 280, "a long prompt is wrapped"


def test_any_text_can_stand_on_it() -> None:
    cells = [[Image.new("RGB", (120, 80))]]
    assert contact_sheet(["雪の上の猫 🐈 " + "x" * 200], ["strength 1"], cells).width == 136
