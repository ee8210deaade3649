"""In which order each stage works on its micro-batches: pure functions, no tensors.

1F1B: PipeDream-Flush, https://arxiv.org/abs/2006.09503, section 2.2.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Action:
    """One stage's forward ("F") or backward ("B") of one micro-batch."""

    kind: Literal["F", "B"]
    micro_batch: int
    stage: int

    def __str__(self) -> str:
        return f"{self.kind}{self.micro_batch}@{self.stage}"


Order = list[Action]


def one_f_one_b(num_stages: int, num_micro_batches: int, *, slack: int = 0) -> list[Order]:
    """Each stage's order of work: a few forwards to fill the pipeline, then one backward per forward.

    Args:
        num_stages: P.
        num_micro_batches: M.
        slack: micro-batches that each stage but the last may hold beyond what 1F1B needs. One absorbs the
            jitter between stages and costs the activations of one more micro-batch.

    Returns:
        P lists of 2M actions. Stage s never holds more than `in_flight(P, s)` micro-batches.
    """
    assert num_stages >= 1 and num_micro_batches >= 1 and slack >= 0
    return [
        _stage_order(stage, num_micro_batches, in_flight(num_stages, stage, slack=slack))
        for stage in range(num_stages)
    ]


def in_flight(num_stages: int, stage: int, *, slack: int = 0) -> int:
    """The most micro-batches whose activations stage `stage` holds at a time: P - s, plus the slack."""
    depth = num_stages - stage
    return depth + slack if depth > 1 else 1


def _stage_order(stage: int, num_micro_batches: int, depth: int) -> Order:
    order: Order = []
    for step in range(num_micro_batches + depth - 1):
        if step < num_micro_batches:
            order.append(Action("F", step, stage))
        if step >= depth - 1:
            order.append(Action("B", step - depth + 1, stage))
    return order


def ideal_efficiency(num_stages: int, num_micro_batches: int) -> float:
    """The share of the time that each of P equal stages computes under 1F1B: M / (M + P - 1)."""
    return num_micro_batches / (num_micro_batches + num_stages - 1)
