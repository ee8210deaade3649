"""Clips fitted to their buckets."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from media_files import picture
from PIL import Image

from tworeel.data.clips import Bucket, Clip
from tworeel.data.errors import MediaError
from tworeel.data.media import read_frames
from tworeel.data.pixels import fit, load_clip, load_images


def clip_of(path: Path, bucket: Bucket, indices: tuple[int, ...], **images: Path) -> Clip:
    return Clip(path=path, caption="x", bucket=bucket, frame_indices=indices, images=images, name="0/x")


def test_a_clip_of_the_buckets_size_is_not_touched(good_video: Path) -> None:
    indices = (0, 2, 2, 23, 7)
    pixels = load_clip(clip_of(good_video, Bucket(5, 96, 128), indices))
    assert pixels.dtype == torch.uint8 and pixels.shape == (3, 5, 96, 128) and pixels.is_contiguous()
    assert torch.equal(pixels, read_frames(good_video, indices).permute(3, 0, 1, 2))


@pytest.mark.parametrize("size", [(64, 64), (160, 96), (48, 112), (16, 16)])
def test_every_bucket_gets_its_size(good_video: Path, size: tuple[int, int]) -> None:
    width, height = size
    assert load_clip(clip_of(good_video, Bucket(1, height, width), (3,))).shape == (3, 1, height, width)


def test_the_centre_is_kept_and_nothing_is_stretched() -> None:
    """A circle stays a circle, in the middle, whatever the bucket's aspect."""
    y, x = np.mgrid[0:200, 0:400]
    disc = np.where((x - 199.5) ** 2 + (y - 99.5) ** 2 < 40**2, 255, 0).astype(np.uint8)
    source = np.repeat(disc[:, :, None], 3, axis=2)
    for bucket in (Bucket(1, 100, 100), Bucket(1, 96, 160), Bucket(1, 208, 112)):
        ys, xs = np.nonzero(fit(source, bucket)[:, :, 0] > 127)
        assert abs(np.ptp(ys) - np.ptp(xs)) <= 1
        assert abs(ys.mean() - (bucket.height - 1) / 2) < 0.5
        assert abs(xs.mean() - (bucket.width - 1) / 2) < 0.5


def test_shrinking_is_antialiased() -> None:
    stripes = np.zeros((64, 64, 3), np.uint8)
    stripes[:, ::2] = 255
    assert np.abs(fit(stripes, Bucket(1, 16, 16)).astype(int) - 127).max() <= 12


def test_condition_images_have_the_clips_size(good_video: Path, tmp_path: Path) -> None:
    Image.fromarray(picture(0, 200, 80)).save(tmp_path / "a.png")
    images = load_images(clip_of(good_video, Bucket(1, 48, 64), (0,), first_image=tmp_path / "a.png"))
    assert images["first_image"].shape == (3, 48, 64) and images["first_image"].dtype == torch.uint8


def test_an_image_becomes_one_frame(tmp_path: Path) -> None:
    Image.fromarray(picture(0, 64, 48)).save(tmp_path / "a.png")
    assert load_clip(clip_of(tmp_path / "a.png", Bucket(1, 48, 64), (0,))).shape == (3, 1, 48, 64)


def test_a_file_that_is_gone_is_an_error_for_the_user(tmp_path: Path) -> None:
    with pytest.raises(MediaError, match="no such file"):
        load_clip(clip_of(tmp_path / "gone.mp4", Bucket(1, 48, 64), (0,)))
