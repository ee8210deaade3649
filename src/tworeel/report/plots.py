"""Curves of a run."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tworeel.errors import UserError
from tworeel.files import write_bytes_atomic
from tworeel.report.format import RunningMean

SMOOTHED_STEPS = 50
"""How many steps the smoothed curve averages, about; in a short run a tenth of all."""


def plot_loss(metrics: Sequence[Mapping[str, Any]], png_path: Path) -> None:
    """Draw the loss of each step, and smoothed.

    Args:
        metrics: `step` and `loss` of each step, as `metrics.jsonl` has them.
        png_path: the picture; an older one is replaced.

    Raises:
        UserError: there is no step to draw.
    """
    if not metrics:
        raise UserError(f"{png_path}: there is no step that could be drawn")
    # A slow import that no other part needs
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    steps, losses = [row["step"] for row in metrics], [row["loss"] for row in metrics]
    mean = RunningMean(1 - 1 / max(1, min(SMOOTHED_STEPS, len(steps) / 10)))
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.plot(steps, losses, color="tab:blue", alpha=0.3, linewidth=0.8, label="each step")
    axes.plot(steps, [mean.add(loss) for loss in losses], color="tab:blue", label="smoothed")
    axes.set(title="Training loss", xlabel="optimizer step", ylabel="loss")
    axes.grid(alpha=0.3)
    axes.legend()
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=120)
    write_bytes_atomic(png_path, buffer.getvalue())
