"""Who computed what, when."""

from __future__ import annotations

import time

import pytest
import torch

from tworeel.engine.schedule import Action
from tworeel.engine.timeline import Span, Timeline, busy_shares, device_shares

CPU = torch.device("cpu")


def test_a_span_lasts_as_long_as_what_runs_inside_of_it() -> None:
    timeline = Timeline([CPU])
    with timeline.span(Action("F", 0, 0)):
        time.sleep(0.02)
    (span,) = timeline.spans()
    assert 0 <= span.start < span.end
    assert span.end - span.start >= 0.02


def test_waiting_for_the_stage_before_is_not_work() -> None:
    # An accelerator's marks: the host has already given the second stage its work while the first computes.
    timeline = Timeline([CPU, CPU])
    first, second = timeline.span(Action("F", 0, 0)), timeline.span(Action("F", 0, 1))
    first.__enter__()
    second.__enter__()
    time.sleep(0.02)
    first.__exit__(None, None, None)
    time.sleep(0.01)
    second.__exit__(None, None, None)
    forward, following = timeline.spans()
    assert (forward.action.stage, following.action.stage) == (0, 1)
    assert following.start == forward.end
    assert following.end > following.start


def test_other_micro_batches_do_not_push_a_span() -> None:
    timeline = Timeline([CPU])
    with timeline.span(Action("F", 0, 0)), timeline.span(Action("F", 1, 0)):
        time.sleep(0.01)
    assert timeline.spans()[1].start < timeline.spans()[0].end


def test_the_busy_share_is_work_over_the_time_of_the_step() -> None:
    spans = [
        Span(Action("F", 0, 0), 1.0, 2.0),
        Span(Action("F", 0, 1), 2.0, 4.0),
        Span(Action("B", 0, 1), 4.0, 5.0),
    ]
    assert busy_shares(spans, 2) == pytest.approx([0.25, 0.75])


def test_a_device_is_busy_while_any_of_its_stages_is() -> None:
    spans = [
        Span(Action("F", 0, 0), 1.0, 2.0),
        Span(Action("F", 0, 1), 2.0, 3.0),
        Span(Action("F", 1, 2), 2.5, 3.5),
        Span(Action("F", 1, 3), 4.0, 5.0),
    ]
    first, second = torch.device("cuda:0"), torch.device("cuda:1")
    assert device_shares(spans, [first, second] * 2) == pytest.approx([2 / 4, 2 / 4])
    assert device_shares(spans, [first, first, first, second]) == pytest.approx([2.5 / 4, 1 / 4])
    assert device_shares(spans, [first] * 4) == pytest.approx([3.5 / 4])
    assert device_shares(spans, [CPU] * 4) == busy_shares(spans, 4)
