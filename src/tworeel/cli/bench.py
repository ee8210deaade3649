"""`tworeel bench`."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING

from tworeel.benchmarks.shapes import make_cases, model_shape
from tworeel.benchmarks.widths import DEFAULT_MODEL, tiny_shape
from tworeel.cli import bench_options as given
from tworeel.cli import options
from tworeel.cli.bench_figures import measure
from tworeel.cli.bench_options import PrecisionName
from tworeel.cli.figures_file import output_problems
from tworeel.cli.importing import importing
from tworeel.cli.watching import watching
from tworeel.errors import UserError, collected, raise_if_any
from tworeel.report.console import say

if TYPE_CHECKING:
    from tworeel.benchmarks.models import Quantization

QUANTIZE: dict[PrecisionName, Quantization | None] = {
    PrecisionName.BF16: None,
    PrecisionName.FP8: "fp8",
    PrecisionName.INT8: "int8",
    PrecisionName.NF4: "nf4",
}


def bench(
    model: given.Model = None,
    shapes: given.Shapes = None,
    tokens: given.Tokens = None,
    blocks: given.Blocks = None,
    micro_batches: given.MicroBatches = None,
    rank: given.Rank = None,
    tiny: given.Tiny = False,
    devices: given.Devices = None,
    split_at: given.SplitAt = None,
    precision: given.Precision = None,
    residency: given.Residency = "auto",
    compile: given.Compile = None,
    cpp_wrapper: given.CppWrapper = None,
    exact: given.Exact = True,
    attention: given.Attention = "auto",
    slack: given.Slack = 1,
    stages_per_device: given.StagesPerDevice = 1,
    streamed: given.Streamed = None,
    cap_gib: given.CapGib = None,
    rounds: given.Rounds = 3,
    compare: given.Compare = None,
    check: given.Check = False,
    json_file: given.JsonFile = None,
    timeline: given.Timeline = None,
) -> None:
    """Measure how fast your devices train; nothing is downloaded.

    Runs optimizer steps of a model of real size with random weights, spread as
    the plan of a run would have it, and says what a clip takes, how busy each
    device is, how much memory is used and what limits. A few minutes on two
    GPUs. Without a GPU a tiny model is run, to show that it works.

    tworeel bench

    tworeel bench --compare naive --check

    tworeel bench --precision bf16 --precision fp8 --micro-batches 4 --micro-batches 8

    tworeel bench --shapes 832x480x81 --cap-gib 22.5 --timeline steps

    tworeel bench --model flux2-dev --precision fp8 --compare naive
    """
    problems = ["--check: needs --compare naive"] if check and compare is None else []
    with collected(problems):
        boundaries = _numbers("--split-at", split_at)
    with collected(problems):
        waiting = _numbers("--streamed", streamed)
    with collected(problems):
        shape = model_shape(model or DEFAULT_MODEL)
        tiny_model = tiny_shape(shape)
        shape = tiny_model if tiny else shape
        cases = make_cases(shape, shapes=shapes or (), tokens=tokens or (), micro_batches=micro_batches or ())
    unwritable = list(output_problems(json_file, timeline))
    if tiny:
        # Before torch is imported: so tiny a model is slowed by more threads than one a stage.
        os.environ.setdefault("OMP_NUM_THREADS", "1")
    with watching() as observer:
        # After what needs none of them; a Ctrl-C is heard meanwhile
        with importing():
            import torch

            from tworeel.benchmarks.machine import devices_of
            from tworeel.benchmarks.preparing import Settings, launched, settings_problems
            from tworeel.engine.attention import before_first_product

        before_first_product(attention)
        with collected(problems):
            found = devices_of(options.device_list(devices))
        if problems:
            raise UserError(*problems, *unwritable)
        on_cpu = all(device.type == "cpu" for device in found)
        compiles = not on_cpu if compile is None else compile
        if devices is None and on_cpu and not tiny:
            say(
                "There is no GPU: a tiny model on cpu,cpu shows that it works; its figures mean nothing else."
            )
            shape = tiny_model
            cases = make_cases(shape, micro_batches=micro_batches or ())
            torch.set_num_threads(1)
        settings = Settings(
            devices=found,
            # Boundaries and counts that are given are meant for the devices in their order.
            may_reorder=devices is None and boundaries is None and waiting is None,
            stages_per_device=stages_per_device,
            split_at=boundaries,
            blocks=blocks,
            residency=residency,
            compile=compiles,
            exact=exact,
            attention=attention,
            slack=slack,
            streamed=waiting,
            rank=rank or shape.rank,
            rounds=rounds,
            compare_naive=compare is not None,
            check=check,
        )
        # What is compiled for a precision and a shape serves all limits of memory.
        caps: list[float | None] = [*cap_gib] if cap_gib else [None]
        quantizations = [QUANTIZE[one] for one in precision or [PrecisionName.BF16]]
        problems += settings_problems(shape, settings, quantizations, caps)
        if cpp_wrapper:
            problems += _cpp_wrapper_problems(compiles)
        raise_if_any([*problems, *unwritable])
        runs = [
            (case, launched(replace(settings, quantize=kind, cap_gib=cap), case, cpp_wrapper))
            for kind, case, cap in itertools.product(quantizations, cases, caps)
        ]
        measure(runs, observer, json_file, timeline)


def _cpp_wrapper_problems(compiles: bool) -> Iterator[str]:
    from tworeel.engine.compiling import require_cpp_compiler

    if not compiles:
        yield "--cpp-wrapper: what is not compiled cannot be launched from C++; needs --compile"
    try:
        require_cpp_compiler()
    except ValueError as error:
        yield f"--cpp-wrapper: {error}"


def _numbers(option: str, text: str | None) -> tuple[int, ...] | None:
    """Turn `20` or `8,8` into numbers."""
    if text is None:
        return None
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() for part in parts):
        raise UserError(f"{option} {text}: must be whole numbers with commas between, for example 8,8")
    return tuple(map(int, parts))
