"""Where the blocks of a transformer go that only renders: by its weights alone."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from tworeel.config.schema import RunConfig
from tworeel.engine.residency import Residency
from tworeel.engine.weight_streaming import enough, more_and_more_streamed
from tworeel.planning.devices import budgets_on
from tworeel.planning.shares import WEIGHTS_SHARE, BlockWeights, share_out
from tworeel.planning.traces import TraceSettings
from tworeel.planning.weights import UnitBytes, unit_bytes
from tworeel.training.choices import settled
from tworeel.training.loadable import J, exceed_shares, place_again, torch_dtype


def placed_by_weights(job: J, config: RunConfig) -> J:
    """The transformer with what the configuration leaves open decided: boundaries, and streamed weights.

    A plan is for training; to render takes little beside the weights. On CPUs all stays as it is, and blocks
    that are set to keep their activations are not streamed.

    Args:
        job: with its blocks placed as the configuration says.
        config: of the run.
    """
    devices, engine = job.placement.devices, config.engine
    budgets = budgets_on(devices)
    if budgets is None:
        return job
    settings = TraceSettings(
        targets=(), dtype=torch_dtype(config.model.dtype), quantize=settled(config).model.quantize
    )
    units = unit_bytes(job.transformer, job.family, settings)
    blocks = [unit for unit in units if unit.is_block]
    others = [unit for unit in units if not unit.is_block]
    around = [0] * len(budgets)
    around[0] += sum(unit.frozen for unit in others if unit.blocks_before == 0)
    around[-1] += sum(unit.frozen for unit in others if unit.blocks_before > 0)
    at: Sequence[int] = job.placement.boundaries[1:-1]
    # Counts that no even shares have blocks for were meant for the boundaries of a plan.
    given = None if exceed_shares(job.placement, engine.streamed_blocks) else engine.streamed_blocks
    if engine.split_at is None and given is None:
        size = settings.dtype.itemsize
        weights = [BlockWeights(block.frozen, {settings.dtype: block.frozen // size}) for block in blocks]
        first, last = (around[0], around[-1]) if len(budgets) > 1 else (around[0], 0)
        at = share_out(weights, budgets, first=first, last=last)
    counts = given or (0,) * len(budgets)
    if given is None and engine.residency != Residency.KEEP:
        stages = [blocks[start:stop] for start, stop in pairwise((0, *at, len(blocks)))]
        names = [budget.device for budget in budgets]
        rooms = [
            WEIGHTS_SHARE * budget.free / names.count(budget.device) - taken
            for budget, taken in zip(budgets, around, strict=True)
        ]
        counts = tuple(map(_too_many, stages, rooms))
    return place_again(job, devices, at, counts)


def _too_many(blocks: Sequence[UnitBytes], room: float) -> int:
    """How many of a stage's blocks must be streamed."""
    sizes = [block.frozen for block in blocks]
    return enough(sum(sizes) - int(room), more_and_more_streamed(sizes))
