"""What `tworeel plan` shows: who does what, what it holds, how long it takes, and what else was weighed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.table import Table

from tworeel.report.format import gibibytes, short_seconds

if TYPE_CHECKING:
    from tworeel.planning.plans import Alternative, Plan, StagePlan

MINUTE, HOUR, DAY = 60, 3600, 86400


def plan_table(plan: Plan) -> Table:
    """A column for each stage, a row for each figure."""
    table = Table(
        title=f"{plan.model}, {plan.precision}, {plan.tokens:,} tokens, {plan.micro_batches} clips a step"
    )
    table.add_column("")
    for stage in plan.stages:
        table.add_column(stage.device, justify="right")
    rows = {
        "card": [stage.card for stage in plan.stages],
        "blocks": [f"{stage.first} to {stage.last}" for stage in plan.stages],
        "leave behind": [_residency(stage) for stage in plan.stages],
        "weights streamed": [_streamed(stage) for stage in plan.stages],
        "clips in flight": [str(stage.in_flight) for stage in plan.stages],
        **{part: [gibibytes(stage.parts[part]) for stage in plan.stages] for part in plan.stages[0].parts},
        "peak": [gibibytes(stage.peak) for stage in plan.stages],
        "left alone": [gibibytes(stage.spare) for stage in plan.stages],
        "free": [gibibytes(stage.free) for stage in plan.stages],
        "a clip, forward": [short_seconds(stage.forward) for stage in plan.stages],
        "a clip, backward": [short_seconds(stage.backward) for stage in plan.stages],
        "busy": [f"{100 * share:.0f} %" for share in plan.busy],
    }
    for name, cells in rows.items():
        table.add_row(name, *cells)
    return table


def verdict_lines(plan: Plan) -> list[str]:
    """Whether it fits, how long it takes, and what limits."""
    per_clip = plan.seconds_per_step / plan.micro_batches
    source = "as measured on these cards" if plan.calibrated else "by the cards' figures"
    total = plan.seconds_per_step * plan.steps
    epoch = plan.seconds_per_step * plan.steps_per_epoch
    return [
        "It fits." if plan.fits else f"It does not fit: {plan.limit}",
        f"A clip takes {short_seconds(per_clip)}, a step {short_seconds(plan.seconds_per_step)} ({source}); "
        f"the cards wait {100 * plan.bubble:.0f} % of it",
        f"An epoch takes {duration(epoch)}, {plan.steps:,} steps take {duration(total)}",
        f"Pinned host memory: {gibibytes(plan.host_memory)} of {gibibytes(plan.host_free)} that may be",
        *([f"What limits: {plan.limit}"] if plan.fits else []),
        *(
            ["Blocks are launched from C++: the first step takes a minute or two more"]
            if plan.cpp_wrapper
            else []
        ),
    ]


def plan_lines(plan: Plan) -> list[str]:
    """The plan in short, a line a stage."""
    lines = [
        f"Plan: {stage.device} ({stage.card}) runs blocks {stage.first} to {stage.last}, "
        f"{gibibytes(stage.peak)} of {gibibytes(stage.free)}"
        for stage in plan.stages
    ]
    per_clip = plan.seconds_per_step / plan.micro_batches
    total = plan.seconds_per_step * plan.steps
    lines.append(f"Plan: {short_seconds(per_clip)} a clip, {duration(total)} in all")
    lines += [f"Plan: not {one.name}: {one.reason}" for one in plan.alternatives]
    return lines


def misfit(plan: Plan) -> str:
    """What does not fit of a plan, by how much, and the smallest changes with which it would."""
    changes = "; ".join(map(in_words, plan.changes))
    return f"{plan.limit}. What would fit it: {changes or 'nothing that is known'}"


def in_words(change: Alternative) -> str:
    """A change, with a step's time and the peaks by stage."""
    figures = [", ".join(gibibytes(peak) for peak in change.peaks)]
    if change.seconds_per_step is not None:
        figures.insert(0, f"{short_seconds(change.seconds_per_step)} a step")
    return f"{change.name} ({': '.join(figures)})"


def alternatives_table(alternatives: Sequence[Alternative], title: str) -> Table:
    """What else was weighed: seconds of a step, peaks, and why it is not the plan."""
    table = Table(title=title)
    for column in ("", "a step", "peaks", "verdict"):
        table.add_column(column)
    for one in alternatives:
        peaks = " ".join(gibibytes(peak) for peak in one.peaks)
        seconds = "" if one.seconds_per_step is None else short_seconds(one.seconds_per_step)
        table.add_row(one.name, seconds, peaks, one.reason)
    return table


def duration(seconds: float) -> str:
    """4000 -> `1.1 hours`."""
    for name, length in (("days", DAY), ("hours", HOUR), ("minutes", MINUTE)):
        if seconds >= 1.5 * length:
            return f"{seconds / length:.1f} {name}"
    return f"{seconds:.0f} seconds"


def _residency(stage: StagePlan) -> str:
    others = stage.num_blocks - stage.kept
    parts = [f"{others} {stage.residency}"] if others else []
    return ", ".join([*parts, *([f"{stage.kept} keep"] if stage.kept else [])])


def _streamed(stage: StagePlan) -> str:
    return f"{stage.streamed} of {stage.num_blocks}" if stage.streamed else "none"
