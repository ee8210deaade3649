"""What `tworeel bench` can be asked for."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated, Literal

import typer

from tworeel.benchmarks.widths import DEFAULT_MODEL, MODELS

WHAT = "What is measured"
HOW = "How it is run"
RESULTS = "What is told"


class PrecisionName(StrEnum):
    """Of the frozen weights; typer takes no list of literals."""

    BF16 = "bf16"
    FP8 = "fp8"
    INT8 = "int8"
    NF4 = "nf4"


Model = Annotated[
    str | None,
    typer.Option(
        help=f"Which model's widths: {', '.join(MODELS)}. {DEFAULT_MODEL} by default.",
        metavar="NAME",
        rich_help_panel=WHAT,
    ),
]
Shapes = Annotated[
    list[str] | None,
    typer.Option(
        help="A clip as WIDTHxHEIGHTxFRAMES, or image-1024, image-1536; for FLUX.2 WIDTHxHEIGHT. Repeat "
        "it for more. 'standard', the default, is 480x832x49 and image-1024, for FLUX.2 512x512 and "
        "1024x1024.",
        metavar="SHAPE",
        rich_help_panel=WHAT,
    ),
]
Tokens = Annotated[
    list[int] | None,
    typer.Option(min=1, help="An image of so many tokens. Repeat it for more.", rich_help_panel=WHAT),
]
Blocks = Annotated[
    int | None,
    typer.Option(min=1, help="Only so many blocks of the model.", rich_help_panel=WHAT),
]
MicroBatches = Annotated[
    list[int] | None,
    typer.Option(
        min=1,
        help="Clips or images of an optimizer step; 8 by default, 16 for images of Wan. Repeat it for more.",
        rich_help_panel=WHAT,
    ),
]
Rank = Annotated[
    int | None,
    typer.Option(min=1, help="Rank of the LoRA; 32 by default, 16 for FLUX.2.", rich_help_panel=WHAT),
]
Tiny = Annotated[
    bool,
    typer.Option(
        "--tiny",
        help="A tiny model of the same family, in fp32: seconds, to see that it works.",
        rich_help_panel=WHAT,
    ),
]
Devices = Annotated[
    str | None,
    typer.Option(
        help="Devices that share the model, for example cuda:0,cuda:1. All GPUs by default.",
        rich_help_panel=HOW,
    ),
]
SplitAt = Annotated[
    str | None,
    typer.Option(
        help="First block of each device after the first, for example 20. By default what a plan chooses, as "
        "in a run; even shares on CPUs.",
        metavar="BLOCK,...",
        rich_help_panel=HOW,
    ),
]
Precision = Annotated[
    list[PrecisionName] | None,
    typer.Option(
        help="Of the frozen weights; bf16, which is not quantized, by default. Repeat it to compare.",
        rich_help_panel=HOW,
    ),
]
Residency = Annotated[
    Literal["auto", "keep", "selective", "recompute", "offload", "offload-selective"],
    typer.Option(help="What a block leaves behind for its backward.", rich_help_panel=HOW),
]
Compile = Annotated[
    bool | None,
    typer.Option(
        "--compile/--eager",
        help="Whether the blocks go through torch.compile. On GPUs they do by default.",
        rich_help_panel=HOW,
    ),
]
CppWrapper = Annotated[
    bool | None,
    typer.Option(
        "--cpp-wrapper/--no-cpp-wrapper",
        help="Whether what is compiled is launched from C++; images on several GPUs by default.",
        rich_help_panel=HOW,
    ),
]
Exact = Annotated[
    bool,
    typer.Option(
        "--exact/--not-exact",
        help="Whether compiled blocks with bf16 weights round and sum where the model's own code does.",
        rich_help_panel=HOW,
    ),
]
Attention = Annotated[
    Literal["auto", "cudnn", "flash", "efficient", "deterministic"],
    typer.Option(help="Attention kernel.", rich_help_panel=HOW),
]
Slack = Annotated[
    int,
    typer.Option(min=0, help="Micro-batches in flight beyond what 1F1B needs.", rich_help_panel=HOW),
]
StagesPerDevice = Annotated[
    int,
    typer.Option(min=1, help="Parts of the model on each device; 2 interleaves.", rich_help_panel=HOW),
]
Streamed = Annotated[
    str | None,
    typer.Option(
        help="Blocks of each device whose weights wait in host memory, for example 8,8. By default what a "
        "plan chooses; none on CPUs.",
        metavar="COUNT,...",
        rich_help_panel=HOW,
    ),
]
CapGib = Annotated[
    list[float] | None,
    typer.Option(
        min=0.1,
        help="GiB that may be used for each stage, as on a smaller card. Repeat it for more.",
        rich_help_panel=HOW,
    ),
]
Rounds = Annotated[
    int, typer.Option(min=1, help="Steps that are timed; the median counts.", rich_help_panel=HOW)
]
Compare = Annotated[
    Literal["naive"] | None,
    typer.Option(
        help="'naive' also runs one micro-batch at a time with per-block device hooks.",
        rich_help_panel=RESULTS,
    ),
]
Check = Annotated[
    bool,
    typer.Option("--check", help="Compare the gradients with the naive run's too.", rich_help_panel=RESULTS),
]
JsonFile = Annotated[
    Path | None,
    typer.Option("--json", help="File for all figures.", metavar="FILE", rich_help_panel=RESULTS),
]
Timeline = Annotated[
    Path | None,
    typer.Option(
        help="Folder for a picture and a trace of a step of each case.",
        metavar="FOLDER",
        rich_help_panel=RESULTS,
    ),
]
