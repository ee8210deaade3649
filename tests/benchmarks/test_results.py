from __future__ import annotations

from typing import Any

import pytest
import torch

from tworeel.benchmarks.machine import Peak
from tworeel.benchmarks.results import (
    StageSeconds,
    agreement_of,
    find_limit,
    ideal_seconds,
    mean_stage_seconds,
)
from tworeel.engine.schedule import Action
from tworeel.engine.timeline import Span

ROOMY: dict[str, Any] = {
    "bubble": 0.1,
    "kernel_share": 0.99,
    "peaks": {"cuda:0": Peak(allocated=50, reserved=60)},
    "limits": {"cuda:0": 100},
    "made_room": None,
}


@pytest.mark.parametrize(
    ("found", "limit", "word"),
    [
        ({}, "compute", "90 %"),
        ({"kernel_share": None}, "compute", "90 %"),
        ({"bubble": 0.3}, "bubble", "--micro-batches"),
        ({"peaks": {"cuda:0": Peak(allocated=50, reserved=97)}, "bubble": 0.3}, "memory", "97 %"),
        ({"made_room": "recompute × 40"}, "memory", "recompute × 40"),
        ({"kernel_share": 0.5, "bubble": 0.3}, "host", "50 %"),
    ],
)
def test_what_limits_is_the_first_that_holds(found: dict[str, Any], limit: str, word: str) -> None:
    answer = find_limit(**{**ROOMY, **found})
    assert answer.by == limit
    assert word in answer.words


def test_gradients_are_compared_each_and_all_together() -> None:
    ours = {"a": torch.tensor([1.0, 0.0]), "b": torch.tensor([[1.0, 1.0]])}
    theirs = {"a": torch.tensor([2.0, 0.0]), "b": torch.tensor([[1.0, 0.0]])}
    found = agreement_of(ours, theirs)
    assert found.worst_tensor == "b"
    assert found.worst_cosine == pytest.approx(0.5**0.5)
    assert found.close == 0.5
    assert found.cosine == pytest.approx(3 / (3 * 5) ** 0.5)


def test_a_stage_takes_the_mean_of_its_forwards_and_of_its_backwards() -> None:
    spans = [
        Span(Action("F", 0, 0), 0.0, 1.0),
        Span(Action("B", 0, 0), 2.0, 5.0),
        Span(Action("F", 0, 0), 0.0, 2.0),
        Span(Action("B", 0, 0), 2.0, 4.0),
    ]
    assert mean_stage_seconds(spans, 1, steps=2) == [StageSeconds(1.5, 2.5)]


@pytest.mark.parametrize(
    ("devices", "stages", "expected"),
    [
        # (M + P - 1) times what a stage works
        ("ab", [(1.0, 2.0), (1.0, 2.0)], 27.0),
        # The last stage decides, behind the first one's forward and before its backward
        ("ab", [(1.0, 2.0), (2.0, 4.0)], 51.0),
        # The first stage decides: with a micro-batch more in flight it never waits
        ("ab", [(2.0, 4.0), (1.0, 2.0)], 48.0),
        ("abab", [(0.5, 1.0)] * 4, 25.5),
        ("a", [(1.0, 2.0)], 24.0),
    ],
)
def test_the_ideal_step_waits_only_at_its_ends(
    devices: str, stages: list[tuple[float, float]], expected: float
) -> None:
    works = [StageSeconds(*seconds) for seconds in stages]
    assert ideal_seconds(devices, 8, 1, works) == expected
