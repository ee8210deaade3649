"""Buckets: the sizes and lengths that clips are fitted to."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

from tworeel.config.schema import DataConfig
from tworeel.data.clips import Bucket
from tworeel.models.family import Traits

Size = tuple[int, int]
"""Width and height in pixels."""


def bucket_sizes(
    resolution: Size, multiple: int, min_aspect: float = 0.5, max_aspect: float = 2.0
) -> tuple[Size, ...]:
    """Return the sizes with about the area of `resolution`, both sides multiples of `multiple`, sorted.

    `resolution` itself, rounded to the multiple, is always one of them; the others have an aspect ratio
    (width over height) between `min_aspect` and `max_aspect`. For each short side there is one long side,
    the one whose area is nearest, in both orientations; and a square.
    """
    asked = (_round_to(resolution[0], multiple), _round_to(resolution[1], multiple))
    area = resolution[0] * resolution[1]
    side = _round_to(math.sqrt(area), multiple)
    sizes = [(side, side)]
    for short in range(multiple, side + 1, multiple):
        long = max(short, _round_to(area / short, multiple))
        sizes += [(short, long), (long, short)]
    fitting = {size for size in sizes if min_aspect <= size[0] / size[1] <= max_aspect}
    return tuple(sorted(fitting | {asked}))


def nearest_size(width: int, height: int, sizes: Iterable[Size]) -> Size:
    """Return the size whose aspect ratio is nearest on a logarithmic scale; ties go to the larger one."""
    aspect = math.log(width / height)
    return min(sizes, key=lambda s: (round(abs(aspect - math.log(s[0] / s[1])), 9), -s[0] * s[1], s))


def longest_length(available: int, lengths: Iterable[int]) -> int | None:
    """Return the longest length that `available` frames fill; None if there is none."""
    return max((length for length in lengths if length <= available), default=None)


def is_length(frames: int, stride: int) -> bool:
    """Tell whether a clip may have that many frames: `stride * k + 1`."""
    return frames >= 1 and (frames - 1) % stride == 0


def latent_frames(frames: int, stride: int) -> int:
    """Return how many latent frames `frames` frames become: (frames - 1) / stride + 1."""
    return (frames - 1) // stride + 1


def tokens(bucket: Bucket, traits: Traits) -> int:
    """Return how many tokens the transformer sees for one clip of this bucket."""
    area = bucket.height * bucket.width // traits.tokens_per_pixel_area
    shown = sum(height * width // traits.tokens_per_pixel_area for height, width in bucket.references)
    return latent_frames(bucket.frames, traits.temporal_stride) * area + shown


def block_tokens(bucket: Bucket, traits: Traits) -> int:
    """Return how many tokens run through a block for one clip: its own, and text where that is joined."""
    return tokens(bucket, traits) + traits.joint_text_tokens


def bucket_problems(data: DataConfig, traits: Traits) -> list[str]:
    """Return what is wrong with the configured lengths and aspect ratios, one line each."""
    wrong = [n for n in data.frames if not (traits.images_only or is_length(n, traits.temporal_stride))]
    problems = [_length_problem(n, traits) for n in wrong]
    if data.min_aspect > data.max_aspect:
        problems.append(
            f"data.min_aspect = {data.min_aspect} is above data.max_aspect = {data.max_aspect}: "
            "it must not be larger"
        )
    return problems


def usable_lengths(frames: Sequence[int], traits: Traits) -> tuple[int, ...]:
    """Return the configured lengths that the model takes, sorted; a model of images takes single frames."""
    if traits.images_only:
        return (1,)
    least = least_frames(traits)
    return tuple(sorted({n for n in frames if n >= least and is_length(n, traits.temporal_stride)}))


def least_frames(traits: Traits) -> int:
    """Return the shortest length that the model takes: no single frame where the first is always given."""
    return 1 + traits.temporal_stride if traits.needs_image else 1


def _length_problem(frames: int, traits: Traits) -> str:
    stride = traits.temporal_stride
    below = (frames - 1) // stride * stride + 1
    return (
        f"data.frames: {frames} is not {stride}k+1, which {traits.variant} needs; "
        f"the nearest allowed values are {below} and {below + stride}"
    )


def _round_to(value: float, multiple: int) -> int:
    return max(multiple, int(value / multiple + 0.5) * multiple)
