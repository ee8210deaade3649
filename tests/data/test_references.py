"""Reference images: the columns that name them, how they are fitted, and what is wrong with them."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers.pipelines.flux2.image_processor import Flux2ImageProcessor
from PIL import Image

from tworeel.config.schema import DataConfig
from tworeel.data.buckets import tokens
from tworeel.data.clips import Bucket
from tworeel.data.metadata import read_source
from tworeel.data.pixels import load_images
from tworeel.data.references import Reference, fit_reference, load_reference
from tworeel.data.scan import Scan, scan
from tworeel.demo.clips import write_clips
from tworeel.errors import UserError
from tworeel.models.family import Traits

MakeConfig = Callable[..., DataConfig]


@pytest.fixture
def edit_traits(traits: Traits) -> Traits:
    """A model of images that takes two reference images."""
    return replace(
        traits, variant="flux2-dev", images_only=True, temporal_stride=1, image_inputs=(), reference_images=2
    )


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Pictures `a`, `b` and `c` of 96x64, 300x200 and 64x80 pixels."""
    generator = np.random.default_rng(0)
    for name, (width, height) in {"a": (96, 64), "b": (300, 200), "c": (64, 80)}.items():
        pixels = generator.integers(0, 256, (height, width, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"{name}.png")
    return tmp_path


def table(folder: Path, **columns: object) -> Path:
    row = {"image": "a.png", "prompt": "a picture", **columns}
    path = folder / "data.jsonl"
    path.write_text(json.dumps(row) + "\n", encoding="utf-8")
    return path


def names(path: Path) -> list[str]:
    listing = read_source(path)
    assert not listing.broken and not listing.problems, listing
    return [reference.name for reference in listing.entries[0].references]


@pytest.mark.parametrize("column", ["reference_image", "reference_images", "edit_image", "control_path"])
def test_a_column_names_one_image_or_a_list(folder: Path, column: str) -> None:
    assert names(table(folder, **{column: "b.png"})) == ["b.png"]
    assert names(table(folder, **{column: ["c.png", "b.png"]})) == ["c.png", "b.png"]
    assert names(table(folder, **{column: '["c.png", "b.png"]'})) == ["c.png", "b.png"]
    assert names(table(folder, **{column: ""})) == names(table(folder)) == []


@pytest.mark.parametrize("column", ["reference_image", "edit_image", "control_path"])
def test_numbered_columns_are_taken_in_the_order_of_their_numbers(folder: Path, column: str) -> None:
    columns = {f"{column}_10": "a.png", f"{column}_2": "b.png", f"{column}_0": "c.png"}
    assert names(table(folder, **columns)) == ["c.png", "b.png", "a.png"]


def test_a_csv_holds_a_list_as_json(folder: Path) -> None:
    path = folder / "data.csv"
    path.write_text('image,prompt,edit_image\na.png,text,"[""b.png"", ""c.png""]"\n', encoding="utf-8")
    assert names(path) == ["b.png", "c.png"]


def test_the_names_of_musubi_are_known(folder: Path) -> None:
    path = folder / "data.jsonl"
    row = {"image_path": "a.png", "caption": "text", "control_path_0": "b.png", "control_path_1": "c.png"}
    path.write_text(json.dumps(row), encoding="utf-8")
    assert names(path) == ["b.png", "c.png"]


@pytest.mark.parametrize(
    ("columns", "reason"),
    [
        ({"edit_image": "gone.png"}, "'gone.png' does not exist in"),
        ({"edit_image": ["b.png", "../x.png"]}, "'../x.png' lies outside of the dataset's folder"),
        ({"edit_image": "[b.png]"}, "edit_image is not a JSON list of paths: [b.png]"),
        ({"edit_image": "[1]"}, "edit_image is not a JSON list of paths: [1]"),
        ({"edit_image": "b.png", "control_path": "c.png"}, "edit_image and control_path are both given"),
        ({"edit_image": "b.png", "edit_image_0": "c.png"}, "edit_image and edit_image_0, … are both given"),
    ],
    ids=str,
)
def test_what_cannot_be_read_is_one_line(folder: Path, columns: dict[str, object], reason: str) -> None:
    [line] = read_source(table(folder, **columns)).broken
    assert line.startswith(f"{folder / 'data.jsonl'}, line 1: ")
    assert reason in line


@pytest.mark.parametrize("size", [(96, 64), (100, 70), (1500, 1000), (3000, 401), (1024, 1024), (1025, 1025)])
def test_an_image_is_fitted_as_the_pipeline_fits_it(tmp_path: Path, edit_traits: Traits, size) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "x.png")
    fitted = fit_reference(tmp_path / "x.png", *size, edit_traits)
    assert isinstance(fitted, Reference)

    assert torch.equal(load_reference(fitted).float() / 127.5 - 1, of_the_pipeline(tmp_path / "x.png"))


def of_the_pipeline(path: Path) -> torch.Tensor:
    """What Flux2Pipeline makes of a reference image before the VAE, rounded to whole bytes."""
    processor = Flux2ImageProcessor(vae_scale_factor=16)
    image = processor._resize_if_exceeds_area(Image.open(path))
    width, height = (side // 16 * 16 for side in image.size)
    found = processor.preprocess(image, height=height, width=width, resize_mode="crop")[0]
    return ((found + 1) * 127.5).round() / 127.5 - 1


def scanned(folder: Path, traits: Traits, make: MakeConfig, **columns: object) -> Scan:
    return scan(make(table(folder, **columns)), traits)


def test_references_keep_their_own_size(folder: Path, edit_traits: Traits, data_config: MakeConfig) -> None:
    found = scanned(folder, edit_traits, data_config, edit_image=["b.png", "c.png"])
    found.raise_problems()
    [clip] = found.clips

    assert clip.bucket == Bucket(1, clip.bucket.height, clip.bucket.width, ((192, 288), (80, 64)))
    images = load_images(clip)
    assert {name: tuple(image.shape) for name, image in images.items()} == {
        "reference_image_0": (3, 192, 288),
        "reference_image_1": (3, 80, 64),
    }
    own = clip.bucket.height * clip.bucket.width // 256
    assert tokens(clip.bucket, edit_traits) == own + 12 * 18 + 5 * 4


def test_a_model_without_reference_images_ignores_them(
    folder: Path, traits: Traits, data_config: MakeConfig
) -> None:
    [clip] = scanned(folder, traits, data_config, edit_image="b.png").clips
    assert clip.references == clip.bucket.references == ()


def test_too_many_too_small_and_too_long_ones_are_named_all_at_once(
    folder: Path, edit_traits: Traits, data_config: MakeConfig
) -> None:
    Image.new("RGB", (63, 100)).save(folder / "small.png")
    Image.new("RGB", (800, 64)).save(folder / "long.png")
    (folder / "damaged.png").write_bytes(b"no picture")
    with pytest.raises(UserError) as caught:
        scanned(
            folder, edit_traits, data_config, edit_image=["b.png", "small.png", "long.png", "damaged.png"]
        )
    text = str(caught.value)
    assert "the first of 4 reference images; flux2-dev takes at most 2" in text
    assert "small.png: a reference image of 63x100 pixels; both sides must have at least 64" in text
    assert "long.png: a reference image of 800x64 pixels" in text
    assert "damaged.png: cannot be read as an image" in text


def test_a_video_is_one_clear_line_for_a_model_of_images(
    tmp_path: Path, edit_traits: Traits, data_config: MakeConfig
) -> None:
    write_clips(tmp_path, count=1)
    found = scan(data_config(tmp_path), edit_traits)

    assert [clip.name for clip in found.clips] == ["0/image.png"]
    [problem] = found.problems
    assert "clip_0.mp4: a video, but flux2-dev is trained on images; leave it out" in problem


def test_lengths_of_clips_do_not_matter_to_a_model_of_images(
    folder: Path, edit_traits: Traits, data_config: MakeConfig
) -> None:
    found = scan(data_config(table(folder), frames=(2, 17)), edit_traits)
    found.raise_problems()
    assert [clip.bucket.frames for clip in found.clips] == [1]
