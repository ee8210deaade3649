from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch

from tworeel.cache.keys import latent_key, text_key
from tworeel.data.clips import Bucket, Clip
from tworeel.data.references import Reference

CLIP = Clip(
    path=Path("a.mp4"),
    caption="a cat",
    bucket=Bucket(5, 32, 48),
    frame_indices=(0, 1, 2, 3, 4),
    images={"first_image": Path("first.png")},
    name="0/a.mp4",
)
HASHES = {
    Path("a.mp4"): "aa",
    Path("b.mp4"): "aa",
    Path("changed.mp4"): "ab",
    Path("first.png"): "11",
    Path("other.png"): "22",
}
KEY = latent_key(CLIP, HASHES, "vae", torch.bfloat16)


@pytest.mark.parametrize(
    "change",
    [
        {"path": Path("changed.mp4")},
        {"bucket": Bucket(5, 48, 32)},
        {"bucket": Bucket(1, 32, 48), "frame_indices": (0,)},
        {"frame_indices": (0, 2, 4, 6, 8)},
        {"images": {}},
        {"images": {"first_image": Path("other.png")}},
        {"images": {"last_image": Path("first.png")}},
        {"references": (Reference(Path("first.png"), (64, 64), 64, 64),)},
    ],
    ids=str,
)
def test_whatever_changes_the_latents_changes_their_key(change: dict[str, object]) -> None:
    assert latent_key(dataclasses.replace(CLIP, **change), HASHES, "vae", torch.bfloat16) != KEY


def test_another_encoder_or_precision_changes_the_key() -> None:
    assert latent_key(CLIP, HASHES, "other vae", torch.bfloat16) != KEY
    assert latent_key(CLIP, HASHES, "vae", torch.float32) != KEY


def test_references_count_by_their_content_order_and_size() -> None:
    def key(*references: Reference) -> str:
        return latent_key(dataclasses.replace(CLIP, references=references), HASHES, "vae", torch.bfloat16)

    first, other = (Reference(Path(name), (80, 64), 80, 64) for name in ("first.png", "other.png"))
    keys = [key(first), key(other), key(first, other), key(other, first)]
    keys.append(key(dataclasses.replace(first, scaled=(70, 64), width=64)))
    assert len(set(keys)) == 5


def test_a_renamed_file_and_another_caption_keep_the_latents() -> None:
    moved = dataclasses.replace(CLIP, path=Path("b.mp4"), name="3/b.mp4", caption="a dog", source=3)
    assert latent_key(moved, HASHES, "vae", torch.bfloat16) == KEY


def test_text_keys_tell_captions_encoders_and_precisions_apart() -> None:
    keys = {
        text_key(caption, encoder, dtype)
        for caption in ("", "a cat", "a cat ", "eine Katze, größer")
        for encoder in ("umt5", "other")
        for dtype in (torch.bfloat16, torch.float32)
    }
    assert len(keys) == 16


def test_keys_stay_the_same_from_release_to_release() -> None:
    # A change here throws away every cache that users have; raise FORMAT_VERSION if that is meant.
    assert KEY == "latents/f273c36f885012c9ca7269747a923d12a4d371d210879143a5d5aed9a12ea5cb"
    text = text_key("a cat", "umt5", torch.float32)
    assert text == "text/f9e338c5c36cc955eb47ed98ed312159f7a1610ec6c796bbaded5e20167c6b84"
