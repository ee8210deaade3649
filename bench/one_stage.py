"""What the engine costs where there is nothing to split: one stage on one device against the plain model.

    python bench/one_stage.py                      4 blocks of a 14B model, 20,280 tokens, on the first GPU
    python bench/one_stage.py --residency recompute --eager
    python bench/one_stage.py --tiny               seconds, on the CPU

The plain model runs its own forward and one backward for each micro-batch; its blocks keep their activations
or are checkpointed, compiled or not, as the stage's are. Both run on the same weights and begin in turns;
the first round warms up, and so does a step before each that is timed. Prints the ratio.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import measuring
import torch
from measuring import console
from torch import nn

from tworeel.benchmarks import machine, models
from tworeel.benchmarks.naive import recomputed
from tworeel.benchmarks.preparing import Prepared, Settings, prepare
from tworeel.benchmarks.shapes import make_cases
from tworeel.benchmarks.widths import TINY, WAN_14B
from tworeel.engine import Pipeline, split

BLOCKS = 4
TARGET = 1.01


@contextmanager
def plain_blocks(prepared: Prepared, *, compile: bool, recompute: bool) -> Iterator[None]:
    """Let the blocks be compiled and checkpointed as any training script does it."""
    blocks = [prepared.model.get_submodule(name) for name in prepared.placement.block_names]
    for block in blocks:
        forward = torch.compile(block.forward) if compile else block.forward
        block.forward = recomputed(forward, preserve_rng_state=False) if recompute else forward
    try:
        yield
    finally:
        for block in blocks:
            del block.forward


def time_of(model: nn.Module, device: torch.device, work: Callable[[], object]) -> float:
    """Seconds from an idle device to an idle device."""
    model.zero_grad(set_to_none=True)
    machine.synchronize([device])
    begin = time.perf_counter()
    work()
    machine.synchronize([device])
    return time.perf_counter() - begin


def compare(prepared: Prepared, device: torch.device, options: argparse.Namespace) -> tuple[float, float]:
    """Seconds of a step: the plain model's, and the stage's; medians of rounds in turns."""
    model, batches = prepared.model.to(device), prepared.batches  # weights are there, buffers are not
    compile, recompute = not options.eager, options.residency == "recompute"

    def plain() -> None:
        for batch in batches:
            models.mean_square(model(**batch)).backward()

    def time_plain() -> float:
        with plain_blocks(prepared, compile=compile, recompute=recompute):
            plain()
            return time_of(model, device, plain)

    def time_staged() -> float:
        # As `torch.compile` does it for the plain model.
        division = split(model, [device], residency=options.residency, compile=compile, exact=False)
        pipeline = Pipeline(division)

        def staged() -> None:
            pipeline.step(batches, lambda output, _: models.mean_square(output))

        staged()  # cuDNN makes its plans anew for new threads
        try:
            return time_of(model, device, staged)
        finally:
            division.remove()

    times: dict[Callable[[], float], list[float]] = {time_plain: [], time_staged: []}
    for turn in range(options.rounds + 1):
        # By turns the first: a device that gets warm is slower for the second.
        for time_it in reversed(times) if turn % 2 else times:
            seconds = time_it()
            if turn:  # the first one compiles
                times[time_it].append(seconds)
    return statistics.median(times[time_plain]), statistics.median(times[time_staged])


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = measuring.one_device_parser(__doc__, blocks=BLOCKS, figures="one_stage.json")
    parser.add_argument("--residency", choices=("keep", "recompute"), default="keep")
    parser.add_argument("--eager", action="store_true", help="do not compile the blocks")
    parser.add_argument("--micro-batches", type=int, default=4, help="of a step (4)")
    return parser.parse_args()


def main() -> None:
    """Time both."""
    options = parse_arguments()
    device, facts = measuring.one_device(options)
    shape, shapes = (TINY, ()) if options.tiny else (WAN_14B, ("480x832x49",))
    (case,) = make_cases(shape, shapes=shapes, micro_batches=[options.micro_batches])
    prepared = prepare(case, Settings(devices=(device,)), 2 if options.tiny else options.blocks)
    plain, staged = compare(prepared, device, options)
    ratio = staged / plain
    console.print(
        f"plain {plain:.4f} s a step, one stage {staged:.4f} s, ratio {ratio:.4f}; at most {TARGET}"
    )
    figures = {"plain": plain, "staged": staged, "ratio": ratio, "machine": facts}
    settings = {key: str(value) for key, value in vars(options).items()}
    measuring.add_results(options.json, {"one_stage": {**figures, "options": settings}})


if __name__ == "__main__":
    main()
