"""The timeline of a step, who computed what and when: as a picture, and as a file for trace viewers.

Spans are given as they are measured, see `tworeel.engine.timeline`.
"""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tworeel.engine.timeline import Span, busy_shares
from tworeel.files import write_bytes_atomic, write_text_atomic

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLOURS = {"F": "#5b8fd6", "B": "#e8955a"}
NAMES = {"F": "forward", "B": "backward"}
LEAST_WIDTH = 0.014
"""A bar narrower than this share of the picture has no number in it."""
_BAR_HEIGHT = 0.72


def draw_timeline(spans: Sequence[Span], devices: Sequence[str], png_path: Path, *, title: str) -> None:
    """Draw a row for each stage, with a bar for each forward and backward and its micro-batch's number.

    Args:
        spans: of one step, at least one, in seconds.
        devices: name of each stage's device.
        png_path: the picture; an older one is replaced.
        title: above the picture.
    """
    # A slow import that no other part needs
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    figure = Figure(figsize=(13, 1.5 + 0.62 * len(devices)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    begin = min(span.start for span in spans)
    duration = max(span.end for span in spans) - begin
    for span in spans:
        _draw_bar(axes, span, begin, duration)
    _draw_shares(axes, busy_shares(spans, len(devices)), duration)
    axes.set_yticks(range(len(devices)), [f"stage {i}\n{name}" for i, name in enumerate(devices)])
    axes.set(xlim=(0, duration), ylim=(len(devices) - 0.5, -0.5), xlabel="seconds since the step began")
    axes.set_title(title, loc="left")
    axes.tick_params(axis="y", length=0)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.grid(axis="x", alpha=0.3)
    axes.set_axisbelow(True)
    patches = [Patch(color=colour, label=NAMES[kind]) for kind, colour in COLOURS.items()]
    axes.legend(handles=patches, loc="lower right", bbox_to_anchor=(1, 1), ncols=2, frameon=False)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=120)
    write_bytes_atomic(png_path, buffer.getvalue())


def write_trace(spans: Sequence[Span], devices: Sequence[str], json_path: Path) -> None:
    """Write the spans as Chrome's trace events, which https://ui.perfetto.dev and chrome://tracing open.

    A process is a device, a thread a stage; times are in microseconds. The format:
    https://docs.google.com/document/d/1CvAClvFfyA5R-PhYUmn5OOQtYMH4h6I0nSsKchNAySU ("complete events").

    Args:
        spans: of one step, in seconds.
        devices: name of each stage's device.
        json_path: the file; an older one is replaced.
    """
    processes = {name: number for number, name in enumerate(dict.fromkeys(devices))}
    names = [_named("process_name", name, pid=number) for name, number in processes.items()]
    names += [
        _named("thread_name", f"stage {stage}", pid=processes[device], tid=stage)
        for stage, device in enumerate(devices)
    ]
    events = [_event(span, processes[devices[span.action.stage]]) for span in spans]
    write_text_atomic(json_path, json.dumps({"traceEvents": names + events, "displayTimeUnit": "ms"}) + "\n")


def _draw_bar(axes: Axes, span: Span, begin: float, duration: float) -> None:
    action, width = span.action, span.end - span.start
    axes.barh(
        action.stage,
        width,
        left=span.start - begin,
        height=_BAR_HEIGHT,
        color=COLOURS[action.kind],
        edgecolor="white",
        linewidth=0.8,
    )
    if width >= LEAST_WIDTH * duration:
        middle = span.start - begin + width / 2
        axes.text(middle, action.stage, str(action.micro_batch), ha="center", va="center", color="black")


def _draw_shares(axes: Axes, shares: Sequence[float], duration: float) -> None:
    for stage, share in enumerate(shares):
        text = f" {100 * share:.0f} % busy"
        axes.text(duration, stage, text, ha="left", va="center", clip_on=False)


def _named(kind: str, name: str, **place: int) -> dict[str, Any]:
    return {"name": kind, "ph": "M", **place, "args": {"name": name}}


def _event(span: Span, process: int) -> dict[str, Any]:
    action = span.action
    return {
        "name": f"{action.kind}{action.micro_batch}",
        "cat": NAMES[action.kind],
        "ph": "X",
        "ts": span.start * 1e6,
        "dur": (span.end - span.start) * 1e6,
        "pid": process,
        "tid": action.stage,
        "args": {"micro_batch": action.micro_batch, "stage": action.stage},
    }
