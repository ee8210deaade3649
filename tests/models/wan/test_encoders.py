"""What each variant's encoders return, and when they count as the same encoders."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tworeel.models.family import Component, Layout, ModelSource, Traits
from tworeel.models.wan.encoders import latent_identity, open_latent_encoder, open_text_encoder, text_identity

CPU = torch.device("cpu")
OpenComponent = Callable[..., Component]
OpenPath = Callable[[Layout], Path]
OpenSource = Callable[..., ModelSource]


def random_pixels(*shape: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)


CLIP = random_pixels(3, 5, 32, 48)
IMAGE = random_pixels(3, 32, 48, seed=1)


@pytest.fixture
def source(tiny_vae: OpenComponent, tiny_text_encoder: OpenComponent, tiny_tokenizer: OpenPath) -> OpenSource:
    """A function (z=16, image_encoder=None, **traits) -> ModelSource with tiny encoders."""

    def make(z: int = 16, image_encoder: Component | None = None, **traits: Any) -> ModelSource:
        return ModelSource(
            traits=Traits(
                family="wan",
                variant="tiny",
                frame_rate=16.0,
                spatial_multiple=16,
                temporal_stride=4,
                tokens_per_pixel_area=256,
                **traits,
            ),
            transformer=Component(files=(), layout="native"),
            vae=tiny_vae("native", z=z),
            text_encoder=tiny_text_encoder("native"),
            tokenizer=tiny_tokenizer("native"),
            image_encoder=image_encoder,
        )

    return make


def encode(source: ModelSource, **images: torch.Tensor) -> dict[str, torch.Tensor]:
    return open_latent_encoder(source, CPU, torch.float32).encode(CLIP, images)


def test_text_to_video_needs_latents_only(source: OpenSource) -> None:
    encoded = encode(source())
    assert {name: tuple(tensor.shape) for name, tensor in encoded.items()} == {"latents": (16, 2, 4, 6)}
    assert encoded["latents"].dtype == torch.float32


def test_image_to_video_takes_its_image_from_the_clip_unless_one_is_given(source: OpenSource) -> None:
    i2v = source(image_inputs=("first_image",))
    own, same, other = encode(i2v), encode(i2v, first_image=CLIP[:, 0]), encode(i2v, first_image=IMAGE)
    assert own.keys() == {"latents", "image_latents"}
    assert own["image_latents"].shape == (16, 2, 4, 6)
    assert torch.equal(own["image_latents"], same["image_latents"])
    assert not torch.equal(own["image_latents"], other["image_latents"])
    assert torch.equal(own["latents"], other["latents"])
    # The VAE is causal: the clip and the clip that is grey after its first frame begin alike.
    torch.testing.assert_close(own["image_latents"][:, 0], own["latents"][:, 0], rtol=1e-5, atol=1e-5)


def test_first_and_last_frame_condition_and_their_clip_features(
    source: OpenSource, tiny_image_encoder: OpenComponent
) -> None:
    clip = tiny_image_encoder("native")
    i2v = encode(source(image_inputs=("first_image",), image_encoder=clip))
    flf2v = encode(source(image_inputs=("first_image", "last_image"), image_encoder=clip))
    assert i2v["image_embeds"].shape == (50, 80)
    assert flf2v["image_embeds"].shape == (100, 80)
    assert torch.equal(flf2v["image_embeds"][:50], i2v["image_embeds"])
    assert not torch.equal(flf2v["image_latents"], i2v["image_latents"])


def test_ti2v_encodes_a_first_image_only_where_one_is_given(source: OpenSource) -> None:
    ti2v = source(z=48, image_inputs=("first_image",), image_optional=True)
    without, given, same = encode(ti2v), encode(ti2v, first_image=IMAGE), encode(ti2v, first_image=CLIP[:, 0])
    assert without.keys() == {"latents"}
    assert given["first_latent"].shape == (48, 1, 2, 3)
    torch.testing.assert_close(same["first_latent"], without["latents"][:, :1], rtol=1e-5, atol=1e-5)


def test_the_text_encoder_opens_from_a_source(source: OpenSource) -> None:
    encoded = open_text_encoder(source(), CPU, torch.float32).encode("a red ball")
    assert encoded["text"].shape[1] == 64


def test_moving_the_files_keeps_both_identities(source: OpenSource, tmp_path: Path) -> None:
    before = source()
    assert before.vae and before.text_encoder and before.tokenizer
    vae = replace(before.vae, files=(Path(shutil.copy(before.vae.files[0], tmp_path / "vae.pth")),))
    text = replace(
        before.text_encoder, files=(Path(shutil.copy(before.text_encoder.files[0], tmp_path / "t5.pth")),)
    )
    tokenizer = Path(shutil.copytree(before.tokenizer, tmp_path / "tokenizer"))
    after = replace(before, vae=vae, text_encoder=text, tokenizer=tokenizer)
    assert latent_identity(after) == latent_identity(before)
    assert text_identity(after) == text_identity(before)


def test_whatever_changes_the_latents_changes_their_identity(
    source: OpenSource, tiny_vae: OpenComponent, tiny_image_encoder: OpenComponent
) -> None:
    t2v, clip = source(), tiny_image_encoder("native")
    folder = tiny_vae("diffusers")
    statistics = replace(folder, config={**folder.config, "latents_mean": [0.0] * 16})
    sources = [
        t2v,
        replace(t2v, vae=tiny_vae("native", z=16, seed=1)),
        replace(t2v, vae=folder),
        replace(t2v, vae=statistics),
        source(image_inputs=("first_image",)),
        source(image_inputs=("first_image",), image_optional=True),
        source(image_inputs=("first_image",), image_encoder=clip),
        source(image_inputs=("first_image", "last_image"), image_encoder=clip),
    ]
    assert len({latent_identity(each) for each in sources}) == len(sources)
    assert len({text_identity(each) for each in sources}) == 1


def test_whatever_changes_the_embeddings_changes_their_identity(
    source: OpenSource, tiny_text_encoder: OpenComponent, tiny_tokenizer: OpenPath, tmp_path: Path
) -> None:
    before = source()
    tokenizer = Path(shutil.copytree(tiny_tokenizer("native"), tmp_path / "tokenizer"))
    with (tokenizer / "tokenizer.json").open("a", encoding="utf-8") as file:
        file.write("\n")
    sources = [
        before,
        replace(before, tokenizer=tokenizer),
        replace(before, tokenizer=tiny_tokenizer("comfyui")),
        replace(before, text_encoder=tiny_text_encoder("native", seed=1)),
    ]
    assert len({text_identity(each) for each in sources}) == len(sources)
