"""Spans that are measured by events on the devices."""

from __future__ import annotations

import time
from itertools import pairwise

import pytest
import torch
from torch import Tensor, nn

from tworeel import Pipeline
from tworeel.engine import StepResult
from tworeel.engine.timeline import Span, busy_shares

pytestmark = pytest.mark.gpu

TICK = 1e-3
"""Seconds that the clocks of two devices may differ."""


class Heavy(nn.Module):
    """Blocks whose work on a GPU takes far longer than giving it the work."""

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(4096, 4096) / 64)

        def forward(self, x: Tensor) -> Tensor:
            for _ in range(20):
                x = torch.tanh(x @ self.weight)
            return x

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(self.Block() for _ in range(8))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x


def step(devices: list[torch.device], count: int) -> tuple[StepResult, float]:
    """One timed step after one to warm up, and its time on the host's clock."""
    pipeline = Pipeline(Heavy().bfloat16(), devices, residency="recompute")
    inputs = [torch.randn(4096, 4096, dtype=torch.bfloat16, device=devices[0]) for _ in range(count)]

    def run() -> StepResult:
        return pipeline.step(inputs, lambda output, _: output.float().square().mean(), timed=True)

    run()
    begin = time.perf_counter()
    result = run()
    return result, time.perf_counter() - begin


def of_stage(spans: tuple[Span, ...], stage: int) -> list[Span]:
    """A stage's spans in the order of their begin."""
    return [span for span in spans if span.action.stage == stage]


def overlap(spans: tuple[Span, ...]) -> float:
    """Seconds in which both stages worked."""
    return sum(
        max(0.0, min(a.end, b.end) - max(a.start, b.start))
        for a in of_stage(spans, 0)
        for b in of_stage(spans, 1)
    )


def test_spans_fill_the_time_of_a_step_on_one_device(gpu: torch.device) -> None:
    result, seconds = step([gpu], 4)
    assert len(result.spans) == 2 * 4
    assert all(0 <= span.start < span.end <= seconds for span in result.spans)
    for earlier, later in pairwise(result.spans):
        assert later.start >= earlier.end - TICK
    assert 0.5 * seconds < sum(span.end - span.start for span in result.spans) <= seconds
    assert busy_shares(result.spans, 1)[0] > 0.9


def test_no_micro_batch_is_on_two_stages_at_once(gpu: torch.device) -> None:
    result, seconds = step([gpu, gpu], 4)
    assert len(result.spans) == 2 * 2 * 4
    for number in range(4):
        own = [span for span in result.spans if span.action.micro_batch == number]
        assert [(s.action.kind, s.action.stage) for s in own] == [("F", 0), ("F", 1), ("B", 1), ("B", 0)]
        assert all(b.start >= a.end - TICK for a, b in pairwise(own))
    assert max(span.end for span in result.spans) <= seconds


def test_two_gpus_work_at_the_same_time(two_gpus: list[torch.device]) -> None:
    result, seconds = step(two_gpus, 8)
    for stage in (0, 1):
        own = of_stage(result.spans, stage)
        assert all(b.start >= a.end - TICK for a, b in pairwise(own))
    assert overlap(result.spans) > 0.4 * seconds
    assert all(share > 0.6 for share in busy_shares(result.spans, 2))


def test_one_micro_batch_after_the_other_never_overlaps(two_gpus: list[torch.device]) -> None:
    result, _ = step(two_gpus, 1)
    assert overlap(result.spans) < TICK
    assert sum(busy_shares(result.spans, 2)) < 1.05
