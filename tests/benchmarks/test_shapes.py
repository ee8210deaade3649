from __future__ import annotations

import pytest

from tworeel.benchmarks.shapes import MOST_POSITIONS, make_cases, model_shape, square_grid
from tworeel.benchmarks.widths import MODELS, TINY, WAN_14B
from tworeel.errors import UserError

TI2V_5B = MODELS["wan-5b"]


def test_the_standard_cases_are_a_clip_and_an_image() -> None:
    clip, image = make_cases(WAN_14B)
    assert (clip.name, clip.tokens, clip.micro_batches) == ("480x832x49", 20_280, 8)
    assert (image.name, image.tokens, image.micro_batches) == ("image-1024", 1024, 16)


@pytest.mark.parametrize(("name", "tokens"), [("480x832x81", 32_760), ("720x1280x81", 75_600)])
def test_named_clips_have_the_tokens_of_their_size(name: str, tokens: int) -> None:
    (case,) = make_cases(WAN_14B, shapes=[name])
    assert case.tokens == tokens


def test_a_larger_stride_makes_fewer_tokens() -> None:
    (case,) = make_cases(TI2V_5B, shapes=["832x480x49"])
    assert case.grid == (13, 15, 26)


def test_the_published_widths_have_heads_of_128() -> None:
    assert {name: shape.heads for name, shape in MODELS.items()} == {
        "wan-14b": 40,
        "wan-1.3b": 12,
        "wan-5b": 24,
        "flux2-dev": 48,
        "flux2-klein-4b": 24,
        "flux2-klein-9b": 32,
        "tiny": 2,
        "tiny-flux2": 2,
    }


def test_tokens_fill_the_squarest_rectangle() -> None:
    assert square_grid(20_280, "--tokens") == (1, 130, 156)
    assert square_grid(1536, "--tokens") == (1, 32, 48)


def test_a_tiny_model_gets_a_tiny_case() -> None:
    (case,) = make_cases(TINY)
    assert (case.tokens, case.micro_batches) == (64, 4)


@pytest.mark.parametrize(
    ("shape", "words"),
    [
        ("imgae-1024", "did you mean 'image-1024'"),
        ("832x480", "must be WIDTHxHEIGHTxFRAMES"),
        ("832x480x48", "frames must be 4k\\+1"),
        ("830x480x49", "multiples of 16"),
        ("0x480x49", "multiples of 16"),
        (f"{16 * (MOST_POSITIONS + 1)}x480x49", "at most 16384"),
    ],
)
def test_a_shape_that_cannot_be_is_refused(shape: str, words: str) -> None:
    with pytest.raises(UserError, match=words):
        make_cases(WAN_14B, shapes=[shape])


def test_a_size_must_suit_the_model() -> None:
    with pytest.raises(UserError, match="multiples of 32 for wan-5b"):
        make_cases(TI2V_5B, shapes=["720x1280x81"])


@pytest.mark.parametrize("tokens", [7919, 0])
def test_tokens_without_a_rectangle_are_refused(tokens: int) -> None:
    with pytest.raises(UserError, match=f"--tokens {tokens}"):
        make_cases(WAN_14B, tokens=[tokens])


def test_an_unknown_model_is_refused_with_the_nearest() -> None:
    with pytest.raises(UserError, match="did you mean 'wan-14b'"):
        model_shape("wan14b")
