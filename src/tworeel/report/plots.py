"""Curves of a run."""

from __future__ import annotations

import io
import json
from pathlib import Path

from tworeel.errors import UserError
from tworeel.files import write_bytes_atomic
from tworeel.report.format import RunningMean

SMOOTHED_STEPS = 50
"""How many steps the smoothed curve averages, about; in a short run a tenth of all."""


def plot_loss(metrics_path: Path, png_path: Path) -> None:
    """Draw the loss of each step, and smoothed, from `metrics.jsonl`.

    Raises:
        UserError: there is no step to draw.
    """
    # A slow import that no other part needs
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    steps, losses = _losses(metrics_path)
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


def _losses(path: Path) -> tuple[list[int], list[float]]:
    """Steps and their losses; a last line that is still being written is left out."""
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    rows = [json.loads(line) for line in text.rpartition("\n")[0].splitlines()]
    if not rows:
        raise UserError(f"{path}: holds no step that could be drawn")
    return [row["step"] for row in rows], [row["loss"] for row in rows]
