"""What `tworeel bench` shows: the machine, a table of the cases, and what limits each."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import starmap
from typing import TYPE_CHECKING, Any

from rich.table import Table

from tworeel.units import GIB, gibibytes

if TYPE_CHECKING:
    from tworeel.benchmarks.machine import Peak
    from tworeel.benchmarks.results import CaseResult, Measured, Planned

NOTHING = "-"
MOST_COLUMNS = 2
NAIVE = "one micro-batch at a time with per-block device hooks"


def fact_lines(facts: Mapping[str, Any]) -> list[str]:
    """The machine, one line a fact."""
    return [
        f"{key}: {', '.join(map(str, value)) if isinstance(value, list) else value}"
        for key, value in facts.items()
    ]


def plain_table(title: str, columns: Sequence[str], rows: Iterable[Sequence[str]]) -> Table:
    """A table whose first column is text and whose others are numbers."""
    table = Table(title=title)
    for number, column in enumerate(columns):
        table.add_column(column, justify="right" if number else "left")
    for row in rows:
        table.add_row(*row)
    return table


def benchmark_tables(results: Sequence[CaseResult], title: str) -> list[Table]:
    """A column for each case, a row for each figure; as many tables as fit 80 characters."""
    starts = range(0, len(results), MOST_COLUMNS)
    return [_benchmark_table(results[start : start + MOST_COLUMNS], title) for start in starts]


def _benchmark_table(results: Sequence[CaseResult], title: str) -> Table:
    """Figures that no case has are left out."""
    columns = [_cells(result) for result in results]
    names = dict.fromkeys(name for cells in columns for name in cells)
    rows = [[name, *(cells.get(name, NOTHING) for cells in columns)] for name in names]
    return plain_table(title, ["", *(result.case.name for result in results)], rows)


def closing_lines(result: CaseResult) -> list[str]:
    """What is to say of a case in words."""
    measured, naive, name, sample = result.measured, result.naive, result.label, result.case.model.sample
    clip = (
        f"{measured.seconds_per_clip:.4g} s {sample}; {measured.limit.words}" if measured else "does not fit"
    )
    lines = [f"{name}: {clip}"]
    if planned := result.planned:
        lines.append(_planned_line(planned, result.peaks, sample))
    if naive and naive.seconds_per_clip is None:
        lines.append(f"  {NAIVE} does not fit")
    if naive and result.speedup is not None:
        own = result.case.model.precision
        fallback = "" if naive.precision == own else f" in {naive.precision}: in {own} that does not fit"
        lines.append(f"  {result.speedup:.2f} times as fast as {NAIVE}{fallback}")
    if measured and measured.agreement:
        lines.append(f"  gradients against it: {measured.agreement.in_words}")
    return lines


def _planned_line(planned: Planned, peaks: Mapping[str, Peak], sample: str) -> str:
    """What was planned, the measured peaks beside the planned ones."""

    def peak(device: str, size: int) -> str:
        seen = f" (measured {peaks[device].allocated / GIB:.1f})" if device in peaks else ""
        return f"{device} {gibibytes(size)}{seen}"

    words = [f"planned: {planned.seconds_per_clip:.4g} s {sample}"]
    words.append("peaks " + ", ".join(starmap(peak, planned.peaks.items())))
    if planned.split_at:
        words.append(f"first blocks {', '.join(map(str, planned.split_at))}")
    return "  " + "; ".join([*words, *([] if planned.fits else ["it did not fit"])])


def percent(shares: Iterable[float]) -> str:
    """(0.91, 0.88) -> `91 % 88 %`."""
    return " ".join(f"{100 * share:.0f} %" for share in shares)


def _cells(result: CaseResult) -> dict[str, str]:
    """Figures by the name of their row, in the order in which they are shown."""
    sample = result.case.model.sample
    seconds = f"seconds {sample}"
    cells = {f"{sample.split()[-1]}s a step": str(result.case.micro_batches), "precision": result.precision}
    if result.cap_gib is not None:
        cells["GiB a stage may use"] = f"{result.cap_gib:g}"
    if result.planned:
        cells[f"planned: {seconds}"] = f"{result.planned.seconds_per_clip:.4g}"
    cells |= _measured_cells(result.measured, seconds) if result.measured else {seconds: "does not fit"}
    cells["floor, seconds" if result.case.model.tiny else "floor in bf16, seconds"] = (
        f"{result.floor_seconds:.3g}"
    )
    cells |= _peak_cells("peak", result.peaks)
    if result.pinned_peak:
        cells["pinned host memory"] = f"{result.pinned_peak / GIB:.1f} GiB"
    if result.naive:
        clip = result.naive.seconds_per_clip
        own = result.case.model.precision
        if result.naive.precision != own:
            cells["naive: precision"] = f"{result.naive.precision}, {own} does not fit"
        cells[f"naive: {seconds}"] = "does not fit" if clip is None else f"{clip:.4g}"
        cells |= _peak_cells("naive: peak", result.naive.peaks)
    if result.speedup is not None:
        cells["faster than naive"] = f"{result.speedup:.2f}×"
    return cells


def _measured_cells(measured: Measured, seconds: str) -> dict[str, str]:
    cells = {
        seconds: f"{measured.seconds_per_clip:.4g}",
        "each stage busy": percent(measured.busy),
        "bubble": percent([measured.bubble]),
        "of 1F1B's ideal": percent([measured.ideal_share]),
        "kernels run, alone": "" if measured.kernel_share is None else percent([measured.kernel_share]),
        "blocks leave behind": measured.residency.replace("; ", "\n"),
        "limited by": measured.limit.by,
    }
    return {name: cell for name, cell in cells.items() if cell}


def _peak_cells(what: str, peaks: Mapping[str, Peak]) -> dict[str, str]:
    return {
        f"{what} {device} (reserved)": f"{peak.allocated / GIB:.1f} ({peak.reserved / GIB:.1f}) GiB"
        for device, peak in peaks.items()
    }
