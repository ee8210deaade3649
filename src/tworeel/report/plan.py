"""What `tworeel plan` shows: who does what, what it holds, how long it takes, and what else was weighed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

from tworeel.report.format import short_seconds
from tworeel.units import gibibytes

if TYPE_CHECKING:
    from tworeel.planning.plans import Alternative, Plan, StagePlan

MINUTE, HOUR, DAY = 60, 3600, 86400


def plan_tables(plan: Plan, console: Console) -> list[Table]:
    """A column for each stage, a row for each figure; as many stages a table as the console has room for."""
    clips = _counted(plan.micro_batches, "clip")
    title = f"{plan.model}, {plan.precision}, {plan.tokens:,} tokens, {clips} a step"
    count = len(plan.stages)
    for most in range(count, 0, -1):
        tables = [_table(title, plan, slice(first, first + most)) for first in range(0, count, most)]
        if not any(_cuts_words(table, console) for table in tables):
            break
    return tables


def _cuts_words(table: Table, console: Console) -> bool:
    return any("…" in segment.text for line in console.render_lines(table) for segment in line)


def _table(title: str, plan: Plan, some: slice) -> Table:
    """With some of the stages."""
    stages = plan.stages[some]
    table = Table(title=title)
    table.add_column("")
    for stage in stages:
        table.add_column(stage.device, justify="right")
    rows = {
        "card": [stage.card for stage in stages],
        "blocks": [f"{stage.first} to {stage.last}" for stage in stages],
        "precision": [plan.precision] * len(stages),
        "leave behind": [_residency(stage) for stage in stages],
        "weights streamed": [_streamed(stage) for stage in stages],
        "clips in flight": [str(stage.in_flight) for stage in stages],
        **{part: [gibibytes(stage.parts[part]) for stage in stages] for part in stages[0].parts},
        "peak": [gibibytes(stage.peak) for stage in stages],
        "left to the allocator": [gibibytes(stage.spare) for stage in stages],
        f"free{stages[0].part_of_card}": [gibibytes(stage.free) for stage in stages],
        **_context(stages),
        "a clip, forward": [short_seconds(stage.forward) for stage in stages],
        "a clip, backward": [short_seconds(stage.backward) for stage in stages],
        "busy": [f"{100 * share:.0f} %" for share in plan.busy[some]],
    }
    for name, cells in rows.items():
        table.add_row(name, *cells)
    return table


def _context(stages: Sequence[StagePlan]) -> dict[str, list[str]]:
    """What is left of cards that need not be here; devices that are here only say what is free."""
    known = [gibibytes(stage.context) for stage in stages if stage.context is not None]
    return {"driver, CUDA context": known} if len(known) == len(stages) else {}


def verdict_lines(plan: Plan, *, host_is_here: bool = False) -> list[str]:
    """Whether it fits, how long it takes, and what limits.

    Args:
        plan: of which it is told.
        host_is_here: host memory is what this machine has free, and another could have more.
    """
    per_clip = plan.seconds_per_step / plan.micro_batches
    source = "as measured on these cards" if plan.calibrated else "by the cards' figures"
    total = plan.seconds_per_step * plan.steps
    epoch = plan.seconds_per_step * plan.steps_per_epoch
    host_lacks = host_is_here and plan.host_memory > plan.host_free
    elsewhere = ". That is this machine's: --host-memory-gib plans for another" if host_lacks else ""
    return [
        "It fits." if plan.fits else f"It does not fit: {plan.limit}{elsewhere}",
        f"A clip takes {short_seconds(per_clip)}, a step {short_seconds(plan.seconds_per_step)} ({source}); "
        f"the cards wait {100 * plan.bubble:.0f} % of it",
        f"An epoch takes {duration(epoch)}, {_counted(plan.steps, 'step')} {duration(total)}",
        *(
            f"{device} holds {gibibytes(plan.peaks[device])} at most: its stages' peaks do not come together"
            for device in plan.apart
        ),
        f"Pinned host memory: {gibibytes(plan.host_memory)} of {gibibytes(plan.host_free)} that may be",
        *(["What blocks take is as measured on these cards"] if plan.measured_bytes else []),
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
        f"{gibibytes(stage.peak)} of {gibibytes(stage.free)}{stage.part_of_card}"
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
    return f"{seconds:.0f} seconds" if seconds >= 1.5 else short_seconds(seconds)


def _counted(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def _residency(stage: StagePlan) -> str:
    others = stage.num_blocks - stage.kept
    parts = [f"{others} {stage.residency}"] if others else []
    return ", ".join([*parts, *([f"{stage.kept} keep"] if stage.kept else [])])


def _streamed(stage: StagePlan) -> str:
    return f"{stage.streamed} of {stage.num_blocks}" if stage.streamed else "none"
