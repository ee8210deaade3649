"""Which source frames a clip is made of. Pure functions on timestamps.

A source is resampled to the model's frame rate on a grid of slots: slot k is at k / rate seconds from the
first frame and shows the source frame with the nearest timestamp, the earlier one of two. No frame is made
up: with a slower source, frames repeat; with a faster one, frames are left out.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from typing import Literal

ClipRule = Literal["head", "uniform", "windows"]

# Containers round timestamps (Matroska to milliseconds): closer calls than this count as ties.
_TIE = 1e-4


def count_slots(duration: float, rate: float) -> int:
    """Return how many frames `duration` seconds are at `rate` frames a second, at least 1."""
    return max(1, int(duration * rate + 0.5))


def nearest(times: Sequence[float], moment: float) -> int:
    """Return the index of the time nearest to `moment`, the earlier one of two; `times` never falls."""
    after = bisect_left(times, moment)
    if after == 0:
        return 0
    if after == len(times):
        return after - 1
    gap_before, gap_after = moment - times[after - 1], times[after] - moment
    return after if gap_after < gap_before - _TIE else after - 1


def choose_windows(
    times: Sequence[float], duration: float, rate: float, frames: int, rule: ClipRule, windows: int = 1
) -> tuple[tuple[int, ...], ...]:
    """Choose the source frames of each clip that is cut from one video.

    Args:
        times: seconds from the first frame, one a source frame.
        duration: seconds, the last frame's included.
        rate: frames a second to resample to.
        frames: length of each clip; the resampled video must fill it.
        rule: `head`: the first `frames` slots. `uniform`: `frames` moments spread evenly from the first to
            the last frame; this changes the apparent speed. `windows`: up to `windows` clips that do not
            overlap, their starts spread evenly from the first slot to the last one that a clip fits at.
        windows: the most clips, for the rule `windows`.

    Returns:
        One tuple of `frames` indices into `times` a clip.
    """
    slots = count_slots(duration, rate)
    assert 1 <= frames <= slots, f"{frames} frames from {slots}"
    if rule == "uniform":
        return (_spread(times, frames),)
    starts = [0] if rule == "head" else _starts(slots, frames, windows)
    return tuple(tuple(nearest(times, (start + k) / rate) for k in range(frames)) for start in starts)


def _starts(slots: int, frames: int, windows: int) -> list[int]:
    count = min(windows, slots // frames)
    if count == 1:
        return [0]
    return [k * (slots - frames) // (count - 1) for k in range(count)]


def _spread(times: Sequence[float], frames: int) -> tuple[int, ...]:
    """Moments spread evenly over all of the video; a single one is its middle."""
    if frames == 1:
        return (nearest(times, times[-1] / 2),)
    return tuple(nearest(times, times[-1] * k / (frames - 1)) for k in range(frames))
