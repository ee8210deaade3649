"""What the engine's ways to run a step do to the LoRA's gradients, and whether a step repeats bit for bit.

    python bench/gradients.py                      8 blocks of a 14B model, 7,800 tokens, on two GPUs
    python bench/gradients.py --blocks 40 --tokens 1024
    python bench/gradients.py --tiny               seconds, on the CPU

The same bf16 weights and micro-batches run one at a time with per-block device hooks, then through the
pipeline, eager and compiled. Two roundings of the same step differ: a run in fp32 says how far each of them
is from what both stand for. Then a step with deterministic attention is run twice.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import measuring
import torch
from measuring import console
from torch import nn

from tworeel.benchmarks import machine, models
from tworeel.benchmarks.naive import device_hooks
from tworeel.benchmarks.preparing import Gradients, gradients_of
from tworeel.benchmarks.results import Agreement, agreement_of
from tworeel.benchmarks.shapes import Case, square_grid
from tworeel.benchmarks.widths import TINY, TINY_TOKENS, WAN_14B
from tworeel.engine import Pipeline, Placement, split
from tworeel.engine.attention import AttentionBackend, attention_backend, before_first_product
from tworeel.engine.releasing import release_memory

TOKENS = 7800
RANK = 32


class Step:
    """One step of random weights and micro-batches, the same each time that it is run."""

    def __init__(self, case: Case, blocks: int, devices: Sequence[torch.device]) -> None:
        self._case, self._blocks, self._devices = case, blocks, devices
        self._family = models.family_of(case.model)
        self._batches = models.make_batches(case, torch.bfloat16, devices[0])

    def one_at_a_time(self, *, fp32: bool) -> Gradients:
        """With per-block device hooks, every block checkpointed; in bf16 what the family keeps in fp32 is."""
        model, placement = self._model()
        batches = self._batches
        if fp32:
            model.float()
            batches = [{name: value.float() for name, value in batch.items()} for batch in batches]
        with device_hooks(model, placement):
            for batch in batches:
                models.mean_square(model(**batch)).backward()
        return self._taken(model)

    def pipelined(self, *, compile: bool, attention: AttentionBackend = "auto") -> Gradients:
        """Through the engine, with the residency that fits."""
        model, placement = self._model()
        at = placement.boundaries[1:-1]
        division = split(model, self._devices, at=at, blocks=self._family.block_lists, compile=compile)
        with attention_backend(attention, self._devices):
            Pipeline(division).step(self._batches, lambda output, _: models.mean_square(output))
        return self._taken(model)

    def _model(self) -> tuple[nn.Module, Placement]:
        model = models.build(self._case.model, self._blocks)
        placement = models.place_model(model, self._family, self._devices, None)
        models.fill(model, self._family, placement, dtype=torch.bfloat16, rank=RANK)
        return model, placement

    def _taken(self, model: nn.Module) -> Gradients:
        found = gradients_of(model)
        model.to("meta")
        release_memory()
        return found


def compare(step: Step) -> Iterator[tuple[str, Agreement, Agreement]]:
    """Each way's gradients against those of one micro-batch at a time in bf16, and against fp32."""
    exact = step.one_at_a_time(fp32=True)
    naive = step.one_at_a_time(fp32=False)
    yield "one at a time", agreement_of(naive, naive), agreement_of(naive, exact)
    for name, compile in (("pipelined, eager", False), ("pipelined, compiled", True)):
        ours = step.pipelined(compile=compile)
        yield name, agreement_of(ours, naive), agreement_of(ours, exact)


def repeats(step: Step) -> bool:
    """Whether deterministic attention gives the same bits twice."""
    first, second = (step.pipelined(compile=True, attention="deterministic") for _ in range(2))
    return all(torch.equal(first[name], second[name]) for name in first)


def parse_arguments() -> argparse.Namespace:
    """Read the command line; `--tiny` sets what it does not."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--blocks", type=int, default=8, help="of the model (8)")
    parser.add_argument("--tokens", type=int, help="of a micro-batch (7800: 480×832, 17 frames)")
    parser.add_argument("--micro-batches", type=int, default=4, help="of the step (4)")
    parser.add_argument("--devices", help="for example cuda:0,cuda:1; two by default")
    parser.add_argument("--json", type=Path, default=Path("gradients.json"), help="file for the figures")
    parser.add_argument("--tiny", action="store_true", help="a model of a few million parameters")
    options = parser.parse_args()
    options.tokens = options.tokens or (TINY_TOKENS if options.tiny else TOKENS)
    return options


def main() -> None:
    """Compare, and repeat."""
    options = parse_arguments()
    before_first_product("deterministic")
    devices = measuring.devices_from(options.devices)
    facts = machine.facts(dict.fromkeys(devices))
    measuring.print_machine(facts)
    shape = TINY if options.tiny else WAN_14B
    grid = square_grid(options.tokens, "--tokens")
    case = Case(name="gradients", model=shape, grid=grid, micro_batches=options.micro_batches)
    step = Step(case, options.blocks, devices)
    found: dict[str, Any] = {"machine": facts, "options": {k: str(v) for k, v in vars(options).items()}}
    for name, naive, exact in compare(step):
        console.print(f"{name}: to one at a time {naive.in_words}", soft_wrap=True)
        console.print(f"  to fp32 {exact.in_words}", soft_wrap=True)
        found[name] = {"naive": asdict(naive), "fp32": asdict(exact)}
    found["repeats"] = repeats(step)
    console.print(f"deterministic attention, twice: {'the same bits' if found['repeats'] else 'DIFFERENT'}")
    measuring.add_results(options.json, {"gradients": found})


if __name__ == "__main__":
    main()
