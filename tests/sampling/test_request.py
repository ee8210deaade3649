"""What a configuration asks for, and what is wrong with it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from tworeel.config import RunConfig, load_config
from tworeel.errors import UserError
from tworeel.models.family import Traits
from tworeel.models.wan.family import WAN
from tworeel.sampling.request import make_request

BOTH = (0.0, 1.0)


def config(**sample: Any) -> RunConfig:
    given = {"model.path": "wan", "data.sources": [{"path": "clips"}], "data.resolution": [840, 488]}
    return load_config(None, given | {f"sample.{key}": value for key, value in sample.items()})


def problems(traits: Traits, **sample: Any) -> tuple[str, ...]:
    with pytest.raises(UserError) as error:
        make_request(config(**sample), WAN, traits, BOTH)
    return error.value.problems


def test_what_is_not_said_comes_from_the_family_and_the_training(traits: Traits) -> None:
    request = make_request(config(prompts=["a ball"]), WAN, traits, BOTH)
    assert (request.width, request.height, request.frames) == (832, 480, 17)
    assert (request.guidance, request.steps, request.seed) == (5.0, 20, 0)
    assert request.strengths == BOTH
    assert request.captions == ("a ball", "")


def test_without_guidance_no_negative_prompt_is_embedded(traits: Traits) -> None:
    request = make_request(config(prompts=["a ball"], guidance=1.0), WAN, traits, BOTH)
    assert request.captions == ("a ball",)


def test_a_strength_that_comes_twice_is_rendered_once(traits: Traits) -> None:
    asked = config(prompts=["a ball"], strengths=[0.5, 1, 0.5])
    assert make_request(asked, WAN, traits, BOTH).strengths == (0.5, 1.0)


def test_all_that_does_not_fit_the_model_is_said_at_once(traits: Traits) -> None:
    assert problems(traits, size=[100, 96], frames=8, image="first.png") == (
        "sample.prompts: none given ('tworeel sample' takes --prompt)",
        "sample.size = [100, 96]: wan2.1-t2v-1.3b takes multiples of 16 pixels",
        "sample.frames = 8: wan2.1-t2v-1.3b takes 4k+1 frames",
        f"sample.image = '{Path('first.png').absolute()}': wan2.1-t2v-1.3b takes no such image; leave it out",
    )


def test_an_image_is_asked_for_and_looked_at(image_traits: Traits, tmp_path: Path) -> None:
    assert problems(image_traits, prompts=["a"]) == (
        "sample.image: missing; wan2.2-i2v-a14b starts from images",
    )
    (tmp_path / "broken.png").write_bytes(b"no picture")
    [broken] = problems(image_traits, prompts=["a"], image=tmp_path / "broken.png")
    assert broken.startswith(f"sample.image: {tmp_path / 'broken.png'}: cannot be read as an image")
    Image.new("RGB", (8, 8)).save(tmp_path / "good.png")
    request = make_request(config(prompts=["a"], image=tmp_path / "good.png"), WAN, image_traits, BOTH)
    assert request.images == {"first_image": tmp_path / "good.png"}


def test_an_optional_image_may_be_missing(image_traits: Traits) -> None:
    optional = replace(image_traits, image_optional=True)
    assert make_request(config(prompts=["a"]), WAN, optional, BOTH).images == {}


def test_a_family_that_renders_nothing_says_so(traits: Traits) -> None:
    with pytest.raises(UserError, match="models of the family wan cannot be rendered yet"):
        make_request(config(prompts=["a"]), replace(WAN, sampling=None), traits, BOTH)
