"""Boundaries between unlike cards from weights alone: for a model that no family describes.

What a block leaves behind is not known here, nor how many tokens go through it. All blocks see the same ones,
so that the time of a block is in proportion to its weights.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch

from tworeel.planning.budgets import Budget
from tworeel.planning.work import Work

WEIGHTS_SHARE = 0.8
"""Of a card's free memory that weights may take; the rest is for what the blocks leave behind."""


@dataclass(frozen=True)
class BlockWeights:
    """The weights of a block, with what lives beside it."""

    size: int
    """Bytes."""
    products: dict[torch.dtype, int]
    """How many weights of each dtype are multiplied with."""


def share_out(
    blocks: Sequence[BlockWeights], budgets: Sequence[Budget], *, first: int = 0, last: int = 0
) -> tuple[int, ...]:
    """Find the boundaries whose slowest stage is the fastest, of those whose weights fit.

    Where none fit, those whose fullest card is the least full.

    Args:
        blocks: in the order of the forward; at least one a stage.
        budgets: of the stages' devices. Stages on the same device share its memory and time.
        first, last: bytes beside the blocks on the first and last stage.

    Returns:
        First block of each stage after the first.
    """
    sizes = list(accumulate((block.size for block in blocks), initial=0))
    rooms = _rooms(budgets, first, last)
    devices = [budget.device for budget in budgets]
    seconds = [
        list(accumulate((stages * _seconds(block, budget) for block in blocks), initial=0.0))
        for budget, stages in zip(budgets, map(devices.count, devices), strict=True)
    ]
    slowest = max(each[-1] for each in seconds)

    def cost(stage: int, start: int, stop: int) -> float:
        """Share of the slowest card's time for all blocks, at most 1; beyond 1 how full it is."""
        full = (sizes[stop] - sizes[start]) / rooms[stage]
        return 1 + full if full > 1 else (seconds[stage][stop] - seconds[stage][start]) / slowest

    return _cheapest(cost, len(budgets), len(blocks))


def _cheapest(cost: Callable[[int, int, int], float], stages: int, blocks: int) -> tuple[int, ...]:
    """The boundaries whose dearest stage costs least; of those, the most even ones.

    `cost` takes a stage, its first block and the next stage's.
    """
    # Of the blocks up to each boundary: the dearest stage, how uneven they are, the boundaries before.
    best: dict[int, tuple[float, float, tuple[int, ...]]] = {
        stop: (cost(0, 0, stop), cost(0, 0, stop) ** 2, ()) for stop in range(1, blocks + 1)
    }
    for stage in range(1, stages):
        best = {
            stop: min(
                (max(dearest, cost(stage, start, stop)), uneven + cost(stage, start, stop) ** 2, (*at, start))
                for start, (dearest, uneven, at) in best.items()
                if start < stop
            )
            for stop in range(stage + 1, blocks + 1)
        }
    return best[blocks][2]


def _rooms(budgets: Sequence[Budget], first: int, last: int) -> list[float]:
    """Bytes that each stage's blocks may take; never none at all, to be divided by."""
    devices = [budget.device for budget in budgets]
    rooms = [WEIGHTS_SHARE * budget.free / devices.count(budget.device) for budget in budgets]
    rooms[0] -= first
    rooms[-1] -= last
    return [max(1.0, room) for room in rooms]


def _seconds(block: BlockWeights, budget: Budget) -> float:
    """Of a token's forward: two operations a weight."""
    products: dict[torch.dtype, float] = {}
    for dtype, count in block.products.items():
        is_bf16 = dtype == torch.float8_e4m3fn and budget.fp8_mode == "weight-only"
        known = torch.bfloat16 if is_bf16 else dtype
        products[known] = products.get(known, 0.0) + 2.0 * count
    return budget.rates.forward(Work(products))
