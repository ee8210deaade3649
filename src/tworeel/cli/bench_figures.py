"""Measures the cases of `tworeel bench`, and tells and writes their figures."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from tworeel.benchmarks.shapes import Case
from tworeel.cli.figures_file import write_json
from tworeel.cli.watching import ConsoleObserver
from tworeel.report.console import console, say

if TYPE_CHECKING:
    from tworeel.benchmarks.preparing import Settings
    from tworeel.benchmarks.results import CaseResult


def measure(
    runs: Sequence[tuple[Case, Settings]],
    observer: ConsoleObserver,
    json_file: Path | None,
    timeline: Path | None,
) -> None:
    """Measure the cases; what is asked for is written after each of them.

    Args:
        runs: what is measured, and how; at least one.
        observer: is told of what goes on.
        json_file: for all figures.
        timeline: folder for a picture and a trace of a step of each case.

    Raises:
        UserError: a file cannot be written after all.
    """
    from tworeel.benchmarks import machine
    from tworeel.benchmarks.run import Bench
    from tworeel.report.benchmark import benchmark_tables, closing_lines, fact_lines

    case, settings = runs[0]
    facts = machine.facts(dict.fromkeys(settings.devices))
    for line in fact_lines(facts):
        say(line)
    machine.wake(settings.devices)
    rates = machine.matmul_rates(settings.devices)
    bench, results, figures = Bench(rates, observer), [], []
    try:
        for case, settings in runs:
            result = bench.run(case, settings)
            results.append(result)
            figures.append(result.as_json())
            for line in closing_lines(result):
                say(line)
            if timeline is not None:
                _write_timeline(timeline, result)
            if json_file is not None:
                write_json(json_file, {"machine": facts, "matmul_rates": rates, "cases": figures})
    finally:  # who stops a long comparison keeps what was measured
        where = ", ".join(map(str, settings.devices))
        title = f"{case.model.name} on {where}, LoRA of rank {settings.rank}"
        for table in benchmark_tables(results, title):
            console.print(table)
        if json_file is not None and results:
            say(f"Figures: {json_file}")


def _write_timeline(folder: Path, result: CaseResult) -> None:
    from tworeel.report.timeline import draw_timeline, write_trace

    if result.measured is None:
        return
    devices = [str(device) for device in result.settings.stages]
    title = f"{result.case.model.name}, {result.label}"
    name = title.replace(",", "").replace(" ", "-")
    picture, trace = folder / f"{name}.png", folder / f"{name}.trace.json"
    draw_timeline(result.measured.spans, devices, picture, title=title)
    write_trace(result.measured.spans, devices, trace)
    say(f"  timeline: {picture}, {trace} (for https://ui.perfetto.dev)")
