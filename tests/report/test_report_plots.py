from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image

from tworeel.errors import UserError
from tworeel.report.plots import plot_loss
from tworeel.training.metrics import read_metrics


def test_the_loss_is_drawn_and_a_torn_last_line_is_left_out(tmp_path: Path) -> None:
    metrics, plot = tmp_path / "metrics.jsonl", tmp_path / "loss.png"
    lines = [json.dumps({"step": step, "loss": 1 / step}) for step in range(1, 50)]
    metrics.write_text("\n".join([*lines, '{"step": 50, "lo']), encoding="utf-8")
    plot_loss(read_metrics(metrics), plot)
    with Image.open(plot) as image:
        colours = image.convert("RGB").getcolors(maxcolors=1_000_000)
    assert image.size == (960, 540)
    assert colours is not None and len(colours) > 10


@pytest.mark.parametrize("text", [None, "", '{"step": 1'])
def test_a_run_without_steps_cannot_be_drawn(tmp_path: Path, text: str | None) -> None:
    metrics = tmp_path / "metrics.jsonl"
    if text is not None:
        metrics.write_text(text, encoding="utf-8")
    with pytest.raises(UserError, match="no step"):
        plot_loss(read_metrics(metrics), tmp_path / "loss.png")
