from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from tworeel.engine.schedule import Action
from tworeel.engine.timeline import Span
from tworeel.report.timeline import draw_timeline, write_trace

SPANS = [
    Span(Action("F", 0, 0), 0.0, 1.0),
    Span(Action("F", 1, 0), 1.0, 2.0),
    Span(Action("F", 0, 1), 1.0, 1.5),
    Span(Action("B", 0, 1), 1.5, 3.0),
    Span(Action("B", 0, 0), 3.0, 5.0),
]
DEVICES = ["cuda:0", "cuda:1"]


def events(path: Path, phase: str) -> list[dict[str, Any]]:
    found = json.loads(path.read_text(encoding="utf-8"))["traceEvents"]
    return [event for event in found if event["ph"] == phase]


def test_the_trace_has_every_span_in_microseconds(tmp_path: Path) -> None:
    write_trace(SPANS, DEVICES, path := tmp_path / "trace.json")
    found = events(path, "X")
    assert [event["name"] for event in found] == ["F0", "F1", "F0", "B0", "B0"]
    for event, span in zip(found, SPANS, strict=True):
        assert event["tid"] == span.action.stage
        assert (event["ts"], event["dur"]) == pytest.approx((span.start * 1e6, (span.end - span.start) * 1e6))


def test_the_trace_names_devices_and_stages_also_where_two_share_one(tmp_path: Path) -> None:
    write_trace(SPANS, ["cuda:0", "cuda:0"], path := tmp_path / "trace.json")
    names = [(event["name"], event["args"]["name"]) for event in events(path, "M")]
    assert names == [("process_name", "cuda:0"), ("thread_name", "stage 0"), ("thread_name", "stage 1")]
    assert {event["pid"] for event in events(path, "X")} == {0}


def test_the_picture_has_a_colour_for_forwards_and_one_for_backwards(tmp_path: Path) -> None:
    draw_timeline(SPANS, DEVICES, path := tmp_path / "timeline.png", title="a step")
    with Image.open(path) as image:
        counted = {
            colour: count for count, colour in image.convert("RGB").getcolors(maxcolors=1_000_000) or []
        }
    blue, orange = counted[(0x5B, 0x8F, 0xD6)], counted[(0xE8, 0x95, 0x5A)]
    # 2.5 seconds forward and 3.5 backward, but for the numbers on them and the legend
    assert blue > 1000 and orange / blue == pytest.approx(3.5 / 2.5, rel=0.1)


def test_a_picture_of_many_stages_grows_in_height(tmp_path: Path) -> None:
    draw_timeline(SPANS, DEVICES, two := tmp_path / "two.png", title="two")
    draw_timeline(SPANS, [f"cuda:{i}" for i in range(8)], eight := tmp_path / "eight.png", title="eight")
    with Image.open(two) as small, Image.open(eight) as large:
        assert small.width == large.width and small.height < large.height
