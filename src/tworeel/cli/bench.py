"""`tworeel bench`."""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Sequence
from dataclasses import asdict, replace
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from tworeel.benchmarks.shapes import Case, make_cases, model_shape
from tworeel.benchmarks.widths import DEFAULT_MODEL, MODELS, tiny_shape
from tworeel.cli import options
from tworeel.cli.watching import ConsoleObserver, watching
from tworeel.errors import UserError
from tworeel.report.console import console, say

if TYPE_CHECKING:
    from tworeel.benchmarks.models import Quantization
    from tworeel.benchmarks.preparing import Settings
    from tworeel.benchmarks.results import CaseResult


Residency = Literal["auto", "keep", "selective", "recompute", "offload", "offload-selective"]
Attention = Literal["auto", "cudnn", "flash", "efficient", "deterministic"]
Baseline = Literal["naive"]

WHAT = "What is measured"
HOW = "How it is run"
RESULTS = "What is told"


class Precision(StrEnum):
    """Of the frozen weights; typer takes no list of literals."""

    BF16 = "bf16"
    FP8 = "fp8"
    INT8 = "int8"
    NF4 = "nf4"


QUANTIZE: dict[Precision, Quantization | None] = {
    Precision.BF16: None,
    Precision.FP8: "fp8",
    Precision.INT8: "int8",
    Precision.NF4: "nf4",
}


def bench(
    model: Annotated[
        str | None,
        typer.Option(
            help=f"Which model's widths: {', '.join(MODELS)}. {DEFAULT_MODEL} by default.",
            metavar="NAME",
            rich_help_panel=WHAT,
        ),
    ] = None,
    shapes: Annotated[
        list[str] | None,
        typer.Option(
            help="A clip as WIDTHxHEIGHTxFRAMES, or image-1024, image-1536; for FLUX.2 WIDTHxHEIGHT. Repeat "
            "it for more. 'standard', the default, is 480x832x49 and image-1024, for FLUX.2 512x512 and "
            "1024x1024.",
            metavar="SHAPE",
            rich_help_panel=WHAT,
        ),
    ] = None,
    tokens: Annotated[
        list[int] | None,
        typer.Option(min=1, help="An image of so many tokens. Repeat it for more.", rich_help_panel=WHAT),
    ] = None,
    blocks: Annotated[
        int | None,
        typer.Option(min=1, help="Only so many blocks of the model.", rich_help_panel=WHAT),
    ] = None,
    micro_batches: Annotated[
        list[int] | None,
        typer.Option(
            min=1,
            help="Clips or images of an optimizer step; 8 by default, 16 for images of Wan. Repeat it for "
            "more.",
            rich_help_panel=WHAT,
        ),
    ] = None,
    rank: Annotated[
        int | None,
        typer.Option(min=1, help="Rank of the LoRA; 32 by default, 16 for FLUX.2.", rich_help_panel=WHAT),
    ] = None,
    tiny: Annotated[
        bool,
        typer.Option(
            "--tiny",
            help="A tiny model of the same family: seconds, to see that it works.",
            rich_help_panel=WHAT,
        ),
    ] = False,
    devices: Annotated[
        str | None,
        typer.Option(
            help="Devices that share the model, for example cuda:0,cuda:1. All GPUs by default.",
            rich_help_panel=HOW,
        ),
    ] = None,
    split_at: Annotated[
        str | None,
        typer.Option(
            help="First block of each device after the first, for example 20. Even shares by default.",
            metavar="BLOCK,...",
            rich_help_panel=HOW,
        ),
    ] = None,
    precision: Annotated[
        list[Precision] | None,
        typer.Option(
            help="Of the frozen weights; bf16 by default. Repeat it to compare.", rich_help_panel=HOW
        ),
    ] = None,
    residency: Annotated[
        Residency,
        typer.Option(help="What a block leaves behind for its backward.", rich_help_panel=HOW),
    ] = "auto",
    compile: Annotated[
        bool | None,
        typer.Option(
            "--compile/--eager",
            help="Whether the blocks go through torch.compile. On GPUs they do by default.",
            rich_help_panel=HOW,
        ),
    ] = None,
    attention: Annotated[Attention, typer.Option(help="Attention kernel.", rich_help_panel=HOW)] = "auto",
    slack: Annotated[
        int,
        typer.Option(min=0, help="Micro-batches in flight beyond what 1F1B needs.", rich_help_panel=HOW),
    ] = 1,
    stages_per_device: Annotated[
        int,
        typer.Option(min=1, help="Parts of the model on each device; 2 interleaves.", rich_help_panel=HOW),
    ] = 1,
    streamed: Annotated[
        str | None,
        typer.Option(
            help="Blocks of each device whose weights wait in host memory, for example 8,8.",
            metavar="COUNT,...",
            rich_help_panel=HOW,
        ),
    ] = None,
    cap_gib: Annotated[
        list[float] | None,
        typer.Option(
            min=0.1,
            help="GiB that may be used for each stage, as on a smaller card. Repeat it for more.",
            rich_help_panel=HOW,
        ),
    ] = None,
    rounds: Annotated[
        int, typer.Option(min=1, help="Steps that are timed; the median counts.", rich_help_panel=HOW)
    ] = 3,
    compare: Annotated[
        Baseline | None,
        typer.Option(
            help="'naive' also runs one micro-batch at a time with per-block device hooks.",
            rich_help_panel=RESULTS,
        ),
    ] = None,
    check: Annotated[
        bool,
        typer.Option(
            "--check", help="Compare the gradients with the naive run's too.", rich_help_panel=RESULTS
        ),
    ] = False,
    json_file: Annotated[
        Path | None,
        typer.Option("--json", help="File for all figures.", metavar="FILE", rich_help_panel=RESULTS),
    ] = None,
    timeline: Annotated[
        Path | None,
        typer.Option(
            help="Folder for a picture and a trace of a step of each case.",
            metavar="FOLDER",
            rich_help_panel=RESULTS,
        ),
    ] = None,
) -> None:
    """Measure how fast your devices train; nothing is downloaded.

    Runs optimizer steps of a model of real size with random weights, and says
    what a clip takes, how busy each device is, how much memory is used and what
    limits. A few minutes on two GPUs. Without a GPU a tiny model is run, to show
    that it works.

    tworeel bench

    tworeel bench --compare naive --check

    tworeel bench --precision bf16 --precision fp8 --micro-batches 4 --micro-batches 8

    tworeel bench --shapes 832x480x81 --cap-gib 22.5 --timeline steps

    tworeel bench --model flux2-dev --precision fp8 --compare naive
    """
    if check and compare is None:
        raise UserError("--check: needs --compare naive")
    shape = model_shape(model or DEFAULT_MODEL)
    tiny_model = tiny_shape(shape)
    shape = tiny_model if tiny else shape
    cases = make_cases(shape, shapes=shapes or (), tokens=tokens or (), micro_batches=micro_batches or ())
    numbers = {"--split-at": _numbers("--split-at", split_at), "--streamed": _numbers("--streamed", streamed)}
    if tiny:
        # Before torch is imported: so tiny a model is slowed by more threads than one a stage.
        os.environ.setdefault("OMP_NUM_THREADS", "1")
    with watching() as observer:
        # Slow imports, after what needs none of them; a Ctrl-C is heard meanwhile
        import torch

        from tworeel.benchmarks.machine import devices_of
        from tworeel.benchmarks.preparing import Settings
        from tworeel.engine.attention import before_first_product

        before_first_product(attention)
        found = devices_of(options.device_list(devices))
        on_cpu = all(device.type == "cpu" for device in found)
        if devices is None and on_cpu and not tiny:
            say(
                "There is no GPU: a tiny model on cpu,cpu shows that it works; its figures mean nothing else."
            )
            cases = make_cases(tiny_model, micro_batches=micro_batches or ())
            torch.set_num_threads(1)
        settings = Settings(
            devices=found,
            stages_per_device=stages_per_device,
            split_at=numbers["--split-at"],
            blocks=blocks,
            residency=residency,
            compile=not on_cpu if compile is None else compile,
            attention=attention,
            slack=slack,
            streamed=numbers["--streamed"],
            rank=rank or shape.rank,
            rounds=rounds,
            compare_naive=compare is not None,
            check=check,
        )
        caps: list[float | None] = [*cap_gib] if cap_gib else [None]
        variants = [
            [replace(settings, quantize=QUANTIZE[one], cap_gib=cap) for cap in caps]
            for one in precision or [Precision.BF16]
        ]
        _measure(cases, variants, observer, json_file, timeline)


def _measure(
    cases: Sequence[Case],
    variants: Sequence[Sequence[Settings]],
    observer: ConsoleObserver,
    json_file: Path | None,
    timeline: Path | None,
) -> None:
    from tworeel.benchmarks import machine
    from tworeel.benchmarks.run import Bench
    from tworeel.report.benchmark import benchmark_tables, closing_lines, fact_lines

    for option, folder in (("--json", json_file and json_file.parent), ("--timeline", timeline)):
        _make_folder(option, folder)
    settings = variants[0][0]
    facts = machine.facts(dict.fromkeys(settings.devices))
    for line in fact_lines(facts):
        say(line)
    machine.limit_memory(settings.devices, settings.cap_gib)  # refuses what cannot be limited
    machine.wake(settings.devices)
    rates = machine.matmul_rates(settings.devices)
    bench, results, figures = Bench(rates, observer), [], []
    # What is compiled for a precision and a shape serves all limits of memory.
    runs = ((case, one) for capped, case in itertools.product(variants, cases) for one in capped)
    for case, variant in runs:
        result = bench.run(case, variant)
        results.append(result)
        figures.append({**result.as_json(), "settings": asdict(variant)})
        # At once: who stops a long comparison keeps what was measured.
        for line in closing_lines(result):
            say(line)
        if timeline is not None:
            _write_timeline(timeline, result, variant)
        if json_file is not None:
            _write_json(json_file, {"machine": facts, "matmul_rates": rates, "cases": figures})
    where = ", ".join(map(str, settings.devices))
    for table in benchmark_tables(results, f"{cases[0].model.name} on {where}, LoRA of rank {settings.rank}"):
        console.print(table)
    if json_file is not None:
        say(f"Figures: {json_file}")


def _write_timeline(folder: Path, result: CaseResult, settings: Settings) -> None:
    from tworeel.report.timeline import draw_timeline, write_trace

    if result.measured is None:
        return
    devices = [str(device) for device in settings.stages]
    title = f"{result.case.model.name}, {result.label}"
    name = title.replace(",", "").replace(" ", "-")
    picture, trace = folder / f"{name}.png", folder / f"{name}.trace.json"
    draw_timeline(result.measured.spans, devices, picture, title=title)
    write_trace(result.measured.spans, devices, trace)
    say(f"  timeline: {picture}, {trace} (for https://ui.perfetto.dev)")


def _write_json(path: Path, content: dict[str, Any]) -> None:
    from tworeel.files import write_text_atomic

    write_text_atomic(path, json.dumps(content, indent=1, default=str) + "\n")


def _make_folder(option: str, folder: Path | None) -> None:
    """Before anything is measured, so that no minutes are lost to a wrong path."""
    if folder is None:
        return
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{option}: cannot make the folder {folder}: {error.strerror}") from None


def _numbers(option: str, text: str | None) -> tuple[int, ...] | None:
    """Turn `20` or `8,8` into numbers."""
    if text is None:
        return None
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() for part in parts):
        raise UserError(f"{option} {text}: must be whole numbers with commas between, for example 8,8")
    return tuple(map(int, parts))
