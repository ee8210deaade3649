from __future__ import annotations

from dataclasses import replace

from rich.console import Console

from tworeel.benchmarks.machine import Peak
from tworeel.benchmarks.preparing import Settings
from tworeel.benchmarks.results import Agreement, CaseResult, Limit, Measured, Naive, Planned
from tworeel.benchmarks.shapes import make_cases
from tworeel.benchmarks.widths import FLUX2_DEV, WAN_14B
from tworeel.report.benchmark import benchmark_tables, closing_lines, fact_lines

GIB = 2**30
PEAKS = {"cuda:0": Peak(allocated=20 * GIB, reserved=21 * GIB)}
MEASURED = Measured(
    seconds_per_step=(32.0,),
    seconds_per_clip=4.0,
    busy=(0.9, 0.8),
    bubble=0.15,
    ideal_share=0.92,
    kernel_share=0.97,
    residency="stage 0: 20 recompute; stage 1: 12 selective, 8 keep",
    limit=Limit(by="compute", words="the devices compute 85 % of the step"),
    agreement=Agreement(
        cosine=0.99996, close=0.9, worst_cosine=0.99991, worst_tensor="blocks.0.attn1.to_q.lora_A"
    ),
    spans=(),
)
RESULT = CaseResult(
    case=make_cases(WAN_14B)[0],
    blocks=40,
    precision="bf16",
    floor_seconds=1.37,
    peaks=PEAKS,
    pinned_peak=0,
    measured=MEASURED,
    naive=Naive(seconds_per_clip=6.4, peaks=PEAKS),
    settings=Settings(devices=()),
)
PLANNED = Planned(
    fits=True,
    limit="compute",
    devices=("cuda:0", "cuda:1"),
    split_at=(18,),
    streamed=(0, 0),
    seconds_per_clip=3.92,
    peaks={"cuda:0": int(20.5 * GIB), "cuda:1": 19 * GIB},
    host_memory=0,
    calibrated=True,
)


def printed(*results: CaseResult) -> str:
    console = Console(width=80)
    with console.capture() as capture:
        for table in benchmark_tables(results, "a title"):
            console.print(table)
    return capture.get()


def row(text: str, name: str) -> list[str]:
    lines = [[cell.strip() for cell in line.strip("│").split("│")] for line in text.splitlines()]
    (found,) = [cells[1:] for cells in lines if cells[0] == name]
    return found


def test_the_table_has_a_column_a_case_and_fits_80_characters() -> None:
    image = replace(RESULT, case=make_cases(WAN_14B)[1], naive=None)
    text = printed(RESULT, image)
    assert "…" not in text and "480x832x49" in text and "image-1024" in text
    assert row(text, "seconds a clip") == ["4", "4"]
    assert row(text, "each stage busy") == ["90 % 80 %", "90 % 80 %"]
    assert row(text, "peak cuda:0 (reserved)") == ["20.0 (21.0) GiB"] * 2
    assert row(text, "faster than naive") == ["1.60×", "-"]


def test_a_case_that_does_not_fit_is_told_with_its_peaks() -> None:
    text = printed(replace(RESULT, measured=None))
    assert row(text, "seconds a clip") == ["does not fit"]
    assert row(text, "peak cuda:0 (reserved)") == ["20.0 (21.0) GiB"]
    assert closing_lines(replace(RESULT, measured=None))[0] == "480x832x49, 8 a step, bf16: does not fit"


def test_words_follow_the_table() -> None:
    limit, speedup, gradients = closing_lines(RESULT)
    assert limit == "480x832x49, 8 a step, bf16: 4 s a clip; the devices compute 85 % of the step"
    assert "1.60 times as fast as one micro-batch at a time with per-block device hooks" in speedup
    assert "cosine 0.999960 in all, 90 % of the tensors at least 0.9999, 0.999910 at worst" in gradients


def test_a_naive_run_that_does_not_fit_is_told() -> None:
    alone = replace(RESULT, naive=Naive(seconds_per_clip=None, peaks=PEAKS))
    assert any("does not fit" in line for line in closing_lines(alone))
    assert row(printed(alone), "naive: seconds a clip") == ["does not fit"]


def test_what_was_planned_stands_beside_what_was_measured() -> None:
    planned = replace(RESULT, planned=PLANNED)
    line = closing_lines(planned)[1]
    assert line == (
        "  planned: 3.92 s a clip; peaks cuda:0 20.5 GiB (measured 20.0), cuda:1 19.0 GiB; first blocks 18"
    )
    text = printed(RESULT, planned)
    assert row(text, "planned: seconds a clip") == ["-", "3.92"]
    assert row(text, "seconds a clip") == ["4", "4"]


def test_a_plan_for_one_device_has_no_boundaries_and_may_not_fit() -> None:
    alone = replace(PLANNED, fits=False, devices=("cuda:0",), split_at=(), peaks={"cuda:0": 21 * GIB})
    line = closing_lines(replace(RESULT, planned=alone))[1]
    assert line == "  planned: 3.92 s a clip; peaks cuda:0 21.0 GiB (measured 20.0); it did not fit"


def test_facts_are_lines() -> None:
    assert fact_lines({"devices": ["a", "b"], "cores": 2}) == ["devices: a, b", "cores: 2"]


def test_images_are_called_so_and_a_baseline_in_8_bits_is_told() -> None:
    naive = Naive(seconds_per_clip=6.4, peaks=PEAKS, precision="fp8")
    result = replace(RESULT, case=make_cases(FLUX2_DEV)[0], precision="fp8", naive=naive)
    assert any(line.endswith("in fp8: in bf16 that does not fit") for line in closing_lines(result))
    assert "4 s an image" in closing_lines(result)[0]
    text = printed(result)
    assert row(text, "seconds an image") == ["4"] and row(text, "naive: precision") == [
        "fp8, bf16 does not fit"
    ]


def test_a_limit_of_memory_is_told_in_words_and_in_the_table() -> None:
    limited = replace(RESULT, cap_gib=22.5)
    assert closing_lines(limited)[0].startswith("480x832x49, 8 a step, bf16, 22.5 GiB: 4 s a clip")
    assert row(printed(RESULT, limited), "GiB a stage may use") == ["-", "22.5"]
