"""Pixels of a clip, fitted to its bucket.

Pictures keep their aspect ratio: the largest centred part with the bucket's aspect is cut out and resized
with Pillow's antialiased bicubic filter, which gives the same bytes on every machine.
"""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from tworeel.data.clips import Bucket, Clip
from tworeel.data.media import iter_frames
from tworeel.data.references import load_reference


def load_clip(clip: Clip) -> Tensor:
    """Decode a clip: uint8 RGB, shape (3, frames, height, width) of its bucket.

    Frames are fitted one by one while decoding, so that no more than one is held at its full size.
    Raises `MediaError` if the file is no longer what the scan saw.
    """
    decoded = iter_frames(clip.path, clip.frame_indices)
    fitted = {index: fit(picture, clip.bucket) for index, picture in decoded}
    frames = np.stack([fitted[index] for index in clip.frame_indices])
    return torch.from_numpy(frames).permute(3, 0, 1, 2).contiguous()


def load_images(clip: Clip) -> dict[str, Tensor]:
    """Read a clip's images: uint8 RGB, shape (3, height, width), by name.

    Condition images have the size of its bucket, reference images (`reference_image_0`, …) their own.
    """
    images: dict[str, Tensor] = {}
    for name, path in clip.images.items():
        [(_, picture)] = iter_frames(path, (0,))
        images[name] = torch.from_numpy(fit(picture, clip.bucket)).permute(2, 0, 1).contiguous()
    for number, reference in enumerate(clip.references):
        images[f"reference_image_{number}"] = load_reference(reference)
    return images


def fit(picture: np.ndarray, bucket: Bucket) -> np.ndarray:
    """Resize and crop a uint8 picture (height, width, 3) to the bucket's height and width."""
    height, width = picture.shape[:2]
    scale = max(bucket.width / width, bucket.height / height)
    left = (width - bucket.width / scale) / 2
    top = (height - bucket.height / scale) / 2
    box = (max(left, 0.0), max(top, 0.0), min(width - left, width), min(height - top, height))
    image = Image.fromarray(np.ascontiguousarray(picture))
    resized = image.resize((bucket.width, bucket.height), Image.Resampling.BICUBIC, box=box)
    return np.array(resized)
