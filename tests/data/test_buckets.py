"""Sizes and lengths that clips are fitted to."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from tworeel.config.schema import DataConfig
from tworeel.data.buckets import (
    block_tokens,
    bucket_problems,
    bucket_sizes,
    latent_frames,
    longest_length,
    nearest_size,
    tokens,
)
from tworeel.data.clips import Bucket
from tworeel.models.family import Traits


@pytest.mark.parametrize("resolution", [(832, 480), (1280, 704), (480, 480), (96, 64)])
@pytest.mark.parametrize("multiple", [16, 32])
def test_sizes_are_multiples_of_about_the_asked_area(resolution: tuple[int, int], multiple: int) -> None:
    sizes = bucket_sizes(resolution, multiple)
    area = resolution[0] * resolution[1]
    assert resolution in sizes
    for width, height in sizes:
        assert width % multiple == height % multiple == 0
        assert abs(width * height / area - 1) < multiple * (width + height) / area
        assert 0.5 <= width / height <= 2.0


def test_the_asked_resolution_is_rounded_to_the_multiple_and_kept_whatever_its_aspect() -> None:
    assert (1280, 352) in bucket_sizes((1280, 360), 32)


def test_both_orientations_and_a_square_exist() -> None:
    sizes = bucket_sizes((832, 480), 16)
    assert all((height, width) in sizes for width, height in sizes)
    assert any(width == height for width, height in sizes)


def test_the_nearest_aspect_is_chosen_on_a_logarithmic_scale() -> None:
    sizes = bucket_sizes((832, 480), 16)
    assert nearest_size(1920, 1080, sizes) == (832, 480)
    assert nearest_size(1080, 1920, sizes) == (480, 832)
    rng = random.Random(0)
    for _ in range(200):
        width, height = rng.randrange(50, 4000), rng.randrange(50, 4000)
        chosen = nearest_size(width, height, sizes)
        assert nearest_size(width, height, reversed(sizes)) == chosen
        assert nearest_size(height, width, sizes) == chosen[::-1] or chosen[0] == chosen[1]


def test_a_clip_takes_the_longest_length_that_it_fills() -> None:
    assert [longest_length(n, (1, 17, 33)) for n in (0, 1, 16, 17, 40)] == [None, 1, 1, 17, 33]


def test_tokens_are_those_of_the_authors_table(traits: Traits) -> None:
    assert tokens(Bucket(49, 480, 832), traits) == 20_280
    assert tokens(Bucket(81, 720, 1280), traits) == 75_600
    assert latent_frames(1, 4) == 1


def test_text_counts_in_a_block_only_where_it_is_joined_with_the_clip(traits: Traits) -> None:
    clip = Bucket(49, 480, 832)
    assert block_tokens(clip, traits) == tokens(clip, traits)
    assert block_tokens(clip, replace(traits, joint_text_tokens=512)) == tokens(clip, traits) + 512


def test_a_length_that_the_model_does_not_take_names_the_nearest(
    data_config: Callable[..., DataConfig], traits: Traits
) -> None:
    problems = bucket_problems(data_config(Path("x"), frames=(1, 16, 50)), traits)
    assert len(problems) == 2
    assert "16 is not 4k+1" in problems[0] and "13 and 17" in problems[0]
    assert "49 and 53" in problems[1]
    assert not bucket_problems(data_config(Path("x"), frames=(16,)), replace(traits, temporal_stride=3))


def test_aspect_bounds_the_wrong_way_round_are_a_problem(
    data_config: Callable[..., DataConfig], traits: Traits
) -> None:
    [problem] = bucket_problems(data_config(Path("x"), min_aspect=2.0, max_aspect=1.0), traits)
    assert "min_aspect" in problem and "max_aspect" in problem
