"""The pipeline against the same engine with one micro-batch at a time."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from tworeel.benchmarks.machine import synchronize
from tworeel.engine import Pipeline
from tworeel.engine.pipeline import Loss
from tworeel.engine.timeline import busy_shares
from tworeel.report.benchmark import percent

ALONE = 3
"""Micro-batches that are timed one by one."""
WARM_UP = 4
"""Micro-batches of the step that compiles and fits: more than are in flight."""
TARGET = 0.65
"""A second GPU is worth its price if a clip takes at most this share of the time."""


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Seconds a clip, and the share of a step in which each stage computed; medians over the rounds."""

    one_by_one: float
    pipelined: float
    one_by_one_busy: tuple[float, ...]
    pipelined_busy: tuple[float, ...]

    @property
    def ratio(self) -> float:
        """Pipelined over one by one."""
        return self.pipelined / self.one_by_one


def compare(pipeline: Pipeline, batches: Sequence[Any], loss: Loss, *, rounds: int) -> Comparison:
    """Time steps of all micro-batches at once and of one each, in turns, after a step to warm up.

    One by one, each micro-batch takes as long as any other: a few are enough.
    """

    def together() -> tuple[float, ...]:
        return _busy(pipeline, batches, loss)

    def alone() -> tuple[float, ...]:
        shares = [_busy(pipeline, [batch], loss) for batch in batches[:ALONE]]
        return tuple(statistics.fmean(stage) for stage in zip(*shares, strict=True))

    pipeline.step(batches[:WARM_UP], loss)
    times: dict[str, list[tuple[float, tuple[float, ...]]]] = {"alone": [], "together": []}
    for _ in range(rounds):
        times["alone"].append(_timed(pipeline, alone))
        times["together"].append(_timed(pipeline, together))
    seconds_alone, busy_alone = _median(times["alone"])
    seconds_together, busy_together = _median(times["together"])
    return Comparison(
        one_by_one=seconds_alone / len(batches[:ALONE]),
        pipelined=seconds_together / len(batches),
        one_by_one_busy=busy_alone,
        pipelined_busy=busy_together,
    )


def comparison_rows(comparison: Comparison) -> list[tuple[str, str, str]]:
    """Rows of a table: schedule, seconds a clip, busy shares."""
    return [
        ("one by one", f"{comparison.one_by_one:.4f}", percent(comparison.one_by_one_busy)),
        ("1F1B", f"{comparison.pipelined:.4f}", percent(comparison.pipelined_busy)),
        ("ratio", f"{comparison.ratio:.3f}", f"target: at most {TARGET}"),
    ]


def _busy(pipeline: Pipeline, batches: Sequence[Any], loss: Loss) -> tuple[float, ...]:
    result = pipeline.step(batches, loss, timed=True)
    return tuple(busy_shares(result.spans, pipeline.split.placement.num_stages))


def _timed(pipeline: Pipeline, run: Callable[[], tuple[float, ...]]) -> tuple[float, tuple[float, ...]]:
    pipeline.split.model.zero_grad(set_to_none=True)
    synchronize(pipeline.split.placement.devices)
    begin = time.perf_counter()
    busy = run()
    synchronize(pipeline.split.placement.devices)
    return time.perf_counter() - begin, busy


def _median(rounds: Sequence[tuple[float, tuple[float, ...]]]) -> tuple[float, tuple[float, ...]]:
    """The round with the median time (the slower of the two middle ones)."""
    return sorted(rounds)[len(rounds) // 2]
