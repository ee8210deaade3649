"""Which source frames a clip is made of."""

from __future__ import annotations

import random
from itertools import pairwise

import pytest

from tworeel.data.windows import choose_windows, count_slots, nearest


def even(frames: int, rate: float) -> tuple[tuple[float, ...], float]:
    return tuple(k / rate for k in range(frames)), frames / rate


def test_a_source_at_the_models_rate_is_taken_frame_by_frame() -> None:
    assert choose_windows(*even(20, 16), 16, 17, "head") == (tuple(range(17)),)


def test_a_faster_source_loses_frames_evenly() -> None:
    assert choose_windows(*even(64, 32), 16, 9, "head") == (tuple(range(0, 18, 2)),)


def test_a_slower_source_repeats_frames_and_invents_none() -> None:
    [indices] = choose_windows(*even(10, 8), 16, 17, "head")
    assert indices == (0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6, 6, 7, 7, 8)


def test_ties_go_to_the_earlier_frame_even_with_rounded_timestamps() -> None:
    exact, duration = even(30, 24)
    rounded = tuple(round(time, 3) for time in exact)
    assert choose_windows(exact, duration, 16, 17, "head") == choose_windows(
        rounded, duration, 16, 17, "head"
    )


def test_variable_frame_rates_are_resampled_by_timestamp() -> None:
    times = (0.0, 0.5, 0.55, 0.6, 1.0)
    [indices] = choose_windows(times, 1.25, 8, 9, "head")
    assert indices == (0, 0, 0, 1, 1, 3, 3, 4, 4)


def test_uniform_spreads_over_the_whole_clip() -> None:
    [indices] = choose_windows(*even(81, 16), 16, 17, "uniform")
    assert indices == tuple(range(0, 81, 5))


def test_uniform_takes_the_middle_for_a_single_frame() -> None:
    assert choose_windows(*even(21, 16), 16, 1, "uniform") == ((10,),)


@pytest.mark.parametrize(
    ("frames", "windows", "starts"), [(20, 4, [0, 11]), (40, 3, [0, 15, 31]), (17, 4, [0])]
)
def test_windows_start_evenly_and_do_not_overlap(frames: int, windows: int, starts: list[int]) -> None:
    found = choose_windows(*even(frames, 16), 16, 9, "windows", windows)
    assert [indices[0] for indices in found] == starts


def test_windows_never_overlap_nor_leave_the_clip() -> None:
    rng = random.Random(0)
    for _ in range(300):
        rate, frames, length = rng.uniform(4, 60), rng.randrange(1, 200), rng.choice((1, 5, 9, 17))
        times, duration = even(frames, rate)
        if count_slots(duration, 16) < length:
            continue
        for rule in ("head", "uniform", "windows"):
            found = choose_windows(times, duration, 16, length, rule, 4)
            assert all(len(indices) == length for indices in found)
            assert all(0 <= index < frames for indices in found for index in indices)
            assert all(list(indices) == sorted(indices) for indices in found)
            if rate >= 17:
                assert all(a[-1] < b[0] for a, b in pairwise(found))


def test_a_damaged_header_with_a_huge_duration_costs_nothing() -> None:
    [indices] = choose_windows((0.0, 1e9), 2e9, 16, 17, "head")
    assert indices == (0,) * 17


def test_nearest_clamps_to_the_ends() -> None:
    assert [nearest((0.0, 1.0), moment) for moment in (-5.0, 0.4, 0.6, 9.0)] == [0, 0, 1, 1]
