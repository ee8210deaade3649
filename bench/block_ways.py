"""The same blocks by each way to run them: upstream's forward, ours, compiled exactly, and compiled.

    python bench/block_ways.py                     2 blocks of Wan 14B, 20,280 tokens, on the first GPU
    python bench/block_ways.py --model flux2-dev --shape 1024x1024 --blocks 4
    python bench/block_ways.py --ways "upstream's" ours --residency recompute
    python bench/block_ways.py --tiny              seconds, on the CPU: no peaks

All have copies of the same weights and run the same micro-batch, by turns. Prints the time of a forward and
backward, the peak beside the weights, and with deterministic attention how many of the LoRA's gradients are
upstream's to the bit, and the lowest cosine with them.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from typing import Any

import measuring
import torch
from measuring import gib
from torch import nn

from tworeel.benchmarks import machine, models
from tworeel.benchmarks.preparing import Gradients, Prepared, Settings, gradients_of, prepare
from tworeel.benchmarks.results import agreement_of
from tworeel.benchmarks.shapes import make_cases, model_shape
from tworeel.benchmarks.widths import TINY, WAN_14B
from tworeel.engine import split
from tworeel.engine.attention import AttentionBackend, attention_backend
from tworeel.engine.lean import upstream_forwards
from tworeel.engine.releasing import release_memory
from tworeel.models.wan import blocks as wan_blocks

RESIDENCIES = ("keep", "recompute")
UPSTREAM, OURS, EXACT, COMPILED = WAYS = ("upstream's", "ours", "compiled, exact", "compiled")


@dataclass(frozen=True)
class Found:
    """What one way takes."""

    seconds: float
    peak: int
    """Bytes beside the weights."""
    equal: float
    """Share of the gradients that are upstream's to the bit."""
    worst_cosine: float
    """Of a gradient with upstream's."""


class Run:
    """A copy of a model of a few blocks on one device, run one way."""

    def __init__(self, prepared: Prepared, device: torch.device, way: str, residency: str) -> None:
        self._model = copy.deepcopy(prepared.model)
        split(
            self._model,
            [device],
            blocks=prepared.family.block_lists,
            residency=residency,
            compile=way in (EXACT, COMPILED),
            exact=way == EXACT,
        )
        self._batch, self._device, self._way = prepared.batches[0], device, way

    def __call__(self, attention: AttentionBackend) -> tuple[float, int, Gradients]:
        """Seconds of a forward and backward, peak beside what was there, and gradients."""
        way: AbstractContextManager[None] = nullcontext()
        if self._way == UPSTREAM:
            way = upstream_forwards(self._model)
        with way, attention_backend(attention, [self._device]):
            return _timed(self._model, self._batch, self._device)


def _timed(model: nn.Module, batch: dict[str, Any], device: torch.device) -> tuple[float, int, Gradients]:
    model.zero_grad(set_to_none=True)
    release_memory()
    machine.synchronize([device])
    before = _allocated(device)
    if device.type != "cpu":
        torch.accelerator.reset_peak_memory_stats(device)
    begin = time.perf_counter()
    models.mean_square(model(**batch)).backward()
    machine.synchronize([device])
    seconds = time.perf_counter() - begin
    return seconds, _allocated(device, most=True) - before, gradients_of(model)


def _allocated(device: torch.device, *, most: bool = False) -> int:
    if device.type == "cpu":
        return 0
    ask = torch.accelerator.max_memory_allocated if most else torch.accelerator.memory_allocated
    return int(ask(device))


def compare(
    prepared: Prepared, device: torch.device, ways: Sequence[str], residency: str, rounds: int
) -> dict[str, Found]:
    """Each way's figures; the first way's gradients are what the others' are held against."""
    torch.compiler.reset()  # what was compiled for one residency counts against a limit for the next
    runs = {way: Run(prepared, device, way, residency) for way in ways}
    gradients: dict[str, Gradients] = {}
    for way, run in runs.items():
        gradients[way] = run("deterministic")[-1]
    expected = gradients[ways[0]]
    times: dict[str, list[float]] = {way: [] for way in ways}
    peaks: dict[str, int] = {}
    for turn in range(rounds + 1):
        # By turns the first: a device that gets warm is slower for the last.
        for way in reversed(ways) if turn % 2 else ways:
            seconds, peaks[way], _ = runs[way]("auto")
            if turn:  # the first one warms up
                times[way].append(seconds)
    return {
        way: Found(
            seconds=statistics.median(times[way]),
            peak=peaks[way],
            equal=statistics.mean(torch.equal(found[name], expected[name]) for name in expected),
            worst_cosine=agreement_of(found, expected).worst_cosine,
        )
        for way, found in gradients.items()
    }


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = measuring.one_device_parser(__doc__, blocks=2, figures="block_ways.json")
    parser.add_argument("--model", type=model_shape, default=WAN_14B, help="whose widths (wan-14b)")
    parser.add_argument("--shape", default="832x480x49", help="of the clip or image (832x480x49)")
    parser.add_argument("--ways", choices=WAYS, nargs="+", default=WAYS, help="the first is the measure")
    parser.add_argument("--residency", choices=(*RESIDENCIES, "selective"), nargs="+", default=RESIDENCIES)
    return parser.parse_args()


def main() -> None:
    """Compare them for each residency."""
    options = parse_arguments()
    device, facts = measuring.one_device(options)
    wan_blocks.SMALLEST = 0  # a tiny model's are compared, too
    shape, shapes = (TINY, ()) if options.tiny else (options.model, (options.shape,))
    (case,) = make_cases(shape, shapes=shapes, micro_batches=[1])
    prepared = prepare(case, Settings(devices=(device,)), options.blocks)
    prepared.model.to(device)
    results: dict[str, Any] = {}
    for residency in options.residency:
        found = compare(prepared, device, options.ways, residency, options.rounds)
        results[residency] = {way: asdict(one) for way, one in found.items()}
        measure = found[options.ways[0]]
        measuring.print_table(
            f"{shape.name}, {options.blocks} blocks, {case.tokens} tokens, {residency}",
            ("way", "seconds", f"of {options.ways[0]}", "peak", "the same bits", "worst cosine"),
            (
                (
                    way,
                    f"{one.seconds:.4f}",
                    f"{one.seconds / measure.seconds:.3f}",
                    gib(one.peak),
                    f"{100 * one.equal:.0f} %",
                    f"{one.worst_cosine:.6f}",
                )
                for way, one in found.items()
            ),
        )
    settings = {key: str(value) for key, value in vars(options).items()} | {"model": shape.name}
    what = {"machine": facts, "options": settings, "ways": results}
    measuring.add_results(options.json, {f"block ways {shape.name} {case.name}": what})


if __name__ == "__main__":
    main()
