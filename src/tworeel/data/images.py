"""Strict image reading with Pillow."""

from __future__ import annotations

import struct
import zlib
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from tworeel.data.errors import MediaError

FORMATS = ("PNG", "JPEG", "WEBP", "BMP")
# What Pillow's readers raise for damaged files.
_DAMAGE = (
    OSError,
    SyntaxError,
    ValueError,
    EOFError,
    TypeError,
    IndexError,
    KeyError,
    struct.error,
    zlib.error,
    Image.DecompressionBombError,
)


def read_image(path: Path) -> np.ndarray:
    """Read an image as displayed (EXIF orientation applied): uint8 RGB, shape (height, width, 3).

    Transparency is dropped. Raises `MediaError` for damaged, animated and 16-bit or float images.
    """
    try:
        with Image.open(path, formats=FORMATS) as image:
            image.verify()
        with Image.open(path, formats=FORMATS) as image:
            _check_kind(path, image)
            upright = ImageOps.exif_transpose(image)
            return np.asarray(upright.convert("RGB"))
    except MediaError:
        raise
    except _DAMAGE as error:
        reason = " ".join(str(error).replace(str(path), "the file").split())
        raise MediaError(path, f"cannot be read as an image: {reason}") from error


def _check_kind(path: Path, image: Image.Image) -> None:
    # An MPO file is a JPEG with more pictures behind it, such as a phone's depth map: the first one counts.
    if image.format != "MPO" and getattr(image, "is_animated", False):
        raise MediaError(path, "is an animated image: convert it to a video")
    if image.mode.startswith(("I", "F")):
        raise MediaError(path, f"has more than 8 bits a channel (mode {image.mode}): convert it to 8 bits")
