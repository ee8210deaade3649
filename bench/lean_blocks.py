"""Blocks that are not compiled: upstream's forward against ours, which takes less memory.

    python bench/lean_blocks.py                    2 blocks of Wan 14B, 20,280 tokens, on the first GPU
    python bench/lean_blocks.py --model wan-5b --shape 1280x704x49
    python bench/lean_blocks.py --tiny             seconds, on the CPU: no peaks

Both run the same weights and micro-batch, and take turns. Prints the time of a forward and backward, the peak
beside the weights, and whether the gradients with deterministic attention are equal to the bit.
"""

from __future__ import annotations

import argparse
import statistics
import time
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import measuring
import torch
from measuring import gib

from tworeel.benchmarks import machine, models
from tworeel.benchmarks.preparing import Gradients, Prepared, Settings, gradients_of, prepare
from tworeel.benchmarks.shapes import make_cases, model_shape
from tworeel.benchmarks.widths import TINY, WAN_14B
from tworeel.engine import split
from tworeel.engine.attention import AttentionBackend, attention_backend
from tworeel.engine.lean import upstream_forwards
from tworeel.engine.releasing import release_memory
from tworeel.models.wan import blocks as wan_blocks

RESIDENCIES = ("keep", "recompute")
UPSTREAM, OURS = "upstream's", "ours"


class Blocks:
    """A model of a few blocks on one device, and a micro-batch."""

    def __init__(self, prepared: Prepared, device: torch.device) -> None:
        self._model, self._batch, self._device = prepared.model.to(device), prepared.batches[0], device
        self._weights = self._allocated()

    def run(self, forward: str, residency: str, attention: AttentionBackend) -> tuple[float, int, Gradients]:
        """Seconds of a forward and backward, peak beside the weights, and gradients.

        Args:
            forward: whose.
            residency: what the blocks leave behind.
            attention: which kernel.
        """
        division = split(self._model, [self._device], residency=residency, compile=False)
        way: AbstractContextManager[None] = nullcontext()
        if forward == UPSTREAM:
            way = upstream_forwards(self._model)
        try:
            with way, attention_backend(attention, [self._device]):
                return self._timed()
        finally:
            division.remove()

    def _timed(self) -> tuple[float, int, Gradients]:
        self._model.zero_grad(set_to_none=True)
        release_memory()
        machine.synchronize([self._device])
        if self._device.type != "cpu":
            torch.accelerator.reset_peak_memory_stats(self._device)
        begin = time.perf_counter()
        models.mean_square(self._model(**self._batch)).backward()
        machine.synchronize([self._device])
        seconds = time.perf_counter() - begin
        return seconds, self._allocated(most=True) - self._weights, gradients_of(self._model)

    def _allocated(self, *, most: bool = False) -> int:
        if self._device.type == "cpu":
            return 0
        ask = torch.accelerator.max_memory_allocated if most else torch.accelerator.memory_allocated
        return int(ask(self._device))


def compare(blocks: Blocks, residency: str, options: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """Each forward's figures."""
    times: dict[str, list[float]] = {UPSTREAM: [], OURS: []}
    found: dict[str, dict[str, Any]] = {}
    expected: Gradients = {}
    for turn in range(options.rounds + 2):
        # By turns the first: a device that gets warm is slower for the last.
        for name in reversed(times) if turn % 2 else times:
            attention: AttentionBackend = "auto" if turn else "deterministic"
            seconds, peak, gradients = blocks.run(name, residency, attention)
            if turn > 1:  # the first one with each attention warms up
                times[name].append(seconds)
            if not turn:
                expected = expected or gradients
                equal = all(torch.equal(gradients[key], expected[key]) for key in expected)
                found[name] = {"equal": equal}
            found[name]["peak"] = peak
    for name, seconds_of in times.items():
        found[name]["seconds"] = statistics.median(seconds_of)
    return found


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = measuring.one_device_parser(__doc__, blocks=2, figures="lean_blocks.json")
    parser.add_argument("--model", type=model_shape, default=WAN_14B, help="whose widths (wan-14b)")
    parser.add_argument("--shape", default="480x832x49", help="of the clip (480x832x49)")
    return parser.parse_args()


def main() -> None:
    """Compare them for each residency."""
    options = parse_arguments()
    device, facts = measuring.one_device(options)
    wan_blocks.SMALLEST = 0  # a tiny model's are compared, too
    shape, shapes = (TINY, ()) if options.tiny else (options.model, (options.shape,))
    (case,) = make_cases(shape, shapes=shapes, micro_batches=[1])
    blocks = Blocks(prepare(case, Settings(devices=(device,)), options.blocks), device)
    results: dict[str, Any] = {}
    for residency in RESIDENCIES:
        found = results[residency] = compare(blocks, residency, options)
        measuring.print_table(
            f"{shape.name}, {options.blocks} blocks, {case.tokens} tokens, {residency}",
            ("forward", "seconds", "of upstream's", "peak", "gradients"),
            (
                (
                    name,
                    f"{one['seconds']:.4f}",
                    f"{one['seconds'] / found[UPSTREAM]['seconds']:.3f}",
                    gib(one["peak"]),
                    "the same bits" if one["equal"] else "DIFFERENT",
                )
                for name, one in found.items()
            ),
        )
    settings = {key: str(value) for key, value in vars(options).items()} | {"model": shape.name}
    what = {"machine": facts, "options": settings, "ways": results}
    measuring.add_results(options.json, {f"lean blocks {shape.name} {case.name}": what})


if __name__ == "__main__":
    main()
