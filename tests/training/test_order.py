"""Which clip comes when."""

from __future__ import annotations

import math
from collections import Counter
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from tworeel.data.clips import Bucket, Clip
from tworeel.training.order import Order, generator_for


def make_clips(*counts: int) -> list[Clip]:
    """That many clips of each dataset."""
    return [
        Clip(
            path=Path(f"{source}-{k}.mp4"),
            caption="",
            bucket=Bucket(1, 16, 16),
            frame_indices=(0,),
            source=source,
            name=f"{source}/{k}",
        )
        for source, count in enumerate(counts)
        for k in range(count)
    ]


def course(order: Order, stop: int, start: int = 0) -> list[int]:
    return [order.clip_at(position) for position in range(start, stop)]


def test_each_clip_comes_once_an_epoch() -> None:
    order = Order(make_clips(4, 3), [1.0, 1.0], seed=1)
    for epoch in range(5):
        assert sorted(course(order, 7 * epoch + 7, 7 * epoch)) == list(range(7))


def test_epochs_are_shuffled_each_in_its_own_way() -> None:
    order = Order(make_clips(12), [1.0], seed=1)
    epochs = [tuple(course(order, 12 * k + 12, 12 * k)) for k in range(6)]
    assert len(set(epochs)) == 6
    assert tuple(range(12)) not in epochs


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_order_is_a_pure_function_of_seed_and_position(seed: int) -> None:
    clips, weights = make_clips(5, 4, 2), [1.0, 0.5, 3.0]
    straight = course(Order(clips, weights, seed), 60)
    backwards = Order(clips, weights, seed)
    assert [backwards.clip_at(position) for position in reversed(range(60))] == straight[::-1]
    assert course(Order(clips, weights, seed), 60, start=37) == straight[37:]
    assert course(Order(clips, weights, seed + 10), 60) != straight


def test_a_dataset_of_weight_2_comes_twice_and_one_of_a_half_every_other_epoch() -> None:
    # 3 + 2 * 3 + 0.5 * 3 clips an epoch: two epochs are 21 clips
    order = Order(make_clips(3, 3, 3), [1.0, 2.0, 0.5], seed=0)
    for pair in range(4):
        drawn = Counter(course(order, 21 * pair + 21, 21 * pair))
        assert [drawn[k] for k in range(9)] == [2, 2, 2, 4, 4, 4, 1, 1, 1]


@pytest.mark.parametrize("weight", [0.1, 0.3, 0.5, 1.7, 2.5])
@pytest.mark.parametrize("count", [1, 2, 5])
def test_shares_follow_the_weights_also_for_few_clips(weight: float, count: int) -> None:
    order = Order(make_clips(4, count), [1.0, weight], seed=0)
    drawn = Counter(course(order, 4000))
    share = sum(drawn[k] for k in range(4, 4 + count)) / 4000
    assert share == pytest.approx(weight * count / (4 + weight * count), abs=0.002)
    once = [drawn[k] for k in range(4, 4 + count)]
    in_the_cut_epoch = math.ceil(weight)
    assert max(once) - min(once) <= 1 + in_the_cut_epoch, "all clips come before any comes again"


def test_a_lone_clip_of_small_weight_is_still_all_there_is() -> None:
    assert course(Order(make_clips(1), [0.01], seed=0), 5) == [0] * 5


def test_repeats_are_a_weight() -> None:
    order = Order(make_clips(2, 2), [1.0 * 3, 1.0], seed=5)
    drawn = Counter(course(order, 8))
    assert [drawn[k] for k in range(4)] == [3, 3, 1, 1]


def test_a_dataset_without_clips_is_passed_over() -> None:
    assert sorted(course(Order(make_clips(2, 0, 1), [1.0, 1.0, 1.0], seed=0), 3)) == [0, 1, 2]


def test_generators_differ_by_every_part_and_repeat_by_all() -> None:
    parts = [(0, 1, 2, "noise"), (0, 1, 2, "sigma"), (0, 12, "noise"), (0, 2, 1, "noise"), (1, 1, 2, "noise")]
    drawn = [float(torch.rand((), generator=generator_for(*part))) for part in parts]
    assert len(set(drawn)) == len(parts)
    assert all(a != b for a, b in pairwise(drawn))
    assert float(torch.rand((), generator=generator_for(*parts[0]))) == drawn[0]
