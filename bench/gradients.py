"""What the engine's ways to run a step do to the LoRA's gradients, and whether a step repeats bit for bit.

    python bench/gradients.py                      8 blocks of Wan 14B, 7,800 tokens, on two GPUs
    python bench/gradients.py --model flux2-dev --tokens 1024
    python bench/gradients.py --residency keep auto --compile no --blocks 40
    python bench/gradients.py --tiny               on the CPU

The same bf16 weights and micro-batches run one at a time with per-block device hooks, then through the
pipeline with each residency, eager and compiled. Two roundings of the same step differ: a run in fp32 says
how far each of them is from what all stand for, and one whose inputs differ in a few last bits, how far apart
roundings are. Then a step with deterministic attention is run twice.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import measuring
import torch
from measuring import console
from torch import Tensor, nn

from tworeel.benchmarks import machine, models
from tworeel.benchmarks.naive import device_hooks
from tworeel.benchmarks.preparing import Gradients, gradients_of
from tworeel.benchmarks.results import Agreement, agreement_of
from tworeel.benchmarks.shapes import Case, model_shape, square_grid
from tworeel.benchmarks.widths import DEFAULT_MODEL, MODELS, TINY_TOKENS, tiny_shape
from tworeel.engine import Pipeline, Placement, split
from tworeel.engine.attention import AttentionBackend, attention_backend, before_first_product
from tworeel.engine.releasing import release_memory
from tworeel.engine.residency import AUTO, Residency

TOKENS = 7800
RESIDENCIES = (Residency.KEEP, Residency.SELECTIVE, Residency.OFFLOAD_SELECTIVE, Residency.RECOMPUTE)
COMPILES = {"no": (False,), "yes": (True,), "both": (False, True)}
ONE_AT_A_TIME = "one at a time, bf16"
EVERY = 1000
NUDGED = f"the same, every {EVERY}th number of the inputs in another last bit"


@dataclass(frozen=True)
class Way:
    """How the pipeline runs the step."""

    residency: str
    compile: bool
    exact: bool = True

    def __str__(self) -> str:
        kind = "eager" if not self.compile else "compiled" if self.exact else "compiled, not exact"
        return f"{self.residency}, {kind}"


@dataclass(frozen=True)
class Comparison:
    """What a way's gradients are like."""

    naive: Agreement
    """With those of one micro-batch at a time in bf16."""
    fp32: Agreement
    seconds: float
    """Of all that was done for it: the model, compiling, the step."""


class Step:
    """One step of random weights and micro-batches, the same each time that it is run."""

    def __init__(self, case: Case, blocks: int, devices: Sequence[torch.device]) -> None:
        self._case, self._blocks, self._devices = case, blocks, devices
        self._family = models.family_of(case.model)
        self._batches = models.make_batches(case, torch.bfloat16, devices[0])

    def one_at_a_time(self, *, fp32: bool = False, nudged: bool = False) -> Gradients:
        """With per-block device hooks, every block checkpointed; in bf16 what the family keeps in fp32 is."""
        model, placement = self._model()
        batches = self._batches
        if fp32:
            model.float()
            batches = [_changed(batch, Tensor.float) for batch in batches]
        if nudged:
            batches = [_changed(batch, _nudged) for batch in batches]
        with device_hooks(model, placement):
            for batch in batches:
                models.mean_square(model(**batch)).backward()
        return self._taken(model)

    def pipelined(self, way: Way, *, attention: AttentionBackend = "auto") -> Gradients:
        """Through the engine."""
        model, placement = self._model()
        division = split(
            model,
            self._devices,
            at=placement.boundaries[1:-1],
            blocks=self._family.block_lists,
            residency=way.residency,
            compile=way.compile,
            exact=way.exact,
        )
        with attention_backend(attention, self._devices):
            Pipeline(division).step(self._batches, lambda output, _: models.mean_square(output))
        return self._taken(model)

    def _model(self) -> tuple[nn.Module, Placement]:
        model = models.build(self._case.model, self._blocks)
        placement = models.place_model(model, self._family, self._devices, None)
        rank = self._case.model.rank
        models.fill(model, self._family, placement, dtype=torch.bfloat16, rank=rank)
        return model, placement

    def _taken(self, model: nn.Module) -> Gradients:
        found = gradients_of(model)
        model.to("meta")
        release_memory()
        return found


def _changed(batch: dict[str, Any], change: Callable[[Tensor], Tensor]) -> dict[str, Any]:
    """The same micro-batch with other tensors in the place of those in bf16."""
    return {
        name: change(value) if isinstance(value, Tensor) and value.dtype == torch.bfloat16 else value
        for name, value in batch.items()
    }


def _nudged(tensor: Tensor) -> Tensor:
    """Every so many of its numbers in bf16 further from zero by their last bit."""
    changed = tensor.clone(memory_format=torch.contiguous_format)
    changed.view(torch.int16).flatten()[::EVERY] += 1
    return changed


def compare(step: Step, ways: Sequence[Way]) -> Iterator[tuple[str, Comparison]]:
    """Each way's gradients against those of one micro-batch at a time in bf16, and against fp32."""
    exact = step.one_at_a_time(fp32=True)
    begin = time.perf_counter()
    naive = step.one_at_a_time()
    seconds = time.perf_counter() - begin
    yield ONE_AT_A_TIME, Comparison(agreement_of(naive, naive), agreement_of(naive, exact), seconds)
    nudged = step.one_at_a_time(nudged=True)
    yield NUDGED, Comparison(agreement_of(nudged, naive), agreement_of(nudged, exact), seconds)
    for way in ways:
        torch.compiler.reset()  # what was compiled for one way counts against a limit for the next
        begin = time.perf_counter()
        ours = step.pipelined(way)
        seconds = time.perf_counter() - begin
        yield str(way), Comparison(agreement_of(ours, naive), agreement_of(ours, exact), seconds)


def row(name: str, found: Comparison) -> tuple[str, ...]:
    """A line of the table."""
    cells = []
    for agreement in (found.naive, found.fp32):
        close = f"{agreement.cosine:.6f}, {100 * agreement.close:.0f} %"
        cells += [close, f"{agreement.worst_cosine:.4f}"]
    return name, *cells, f"{found.seconds:.1f}"


def repeats(step: Step, way: Way) -> bool:
    """Whether deterministic attention gives the same bits twice."""
    torch.compiler.reset()
    first, second = (step.pipelined(way, attention="deterministic") for _ in range(2))
    return all(torch.equal(first[name], second[name]) for name in first)


def measure(options: argparse.Namespace, devices: Sequence[torch.device]) -> dict[str, Any]:
    """Compare all ways, and repeat a step of the first residency."""
    grid = square_grid(options.tokens, "--tokens")
    case = Case(name="gradients", model=options.model, grid=grid, micro_batches=options.micro_batches)
    step = Step(case, options.blocks, devices)
    compiles = COMPILES[options.compile]
    exact = not options.not_exact
    ways = [Way(residency, compile, exact) for compile in compiles for residency in options.residency]
    found = dict(compare(step, ways))
    measuring.print_table(
        f"{case.model.name}, {options.blocks} blocks, {options.tokens} tokens: cosine of all LoRA gradients, "
        "tensors of at least 0.9999",
        ("way", "to one at a time", "worst tensor", "to fp32", "worst tensor", "seconds"),
        (row(name, comparison) for name, comparison in found.items()),
    )
    same = {}
    for way in (Way(options.residency[0], compile, exact) for compile in compiles):
        same[str(way)] = repeats(step, way)
        words = "the same bits" if same[str(way)] else "DIFFERENT"
        console.print(f"{way}, deterministic attention, twice: {words}", soft_wrap=True)
    return {"ways": {name: asdict(comparison) for name, comparison in found.items()}, "repeats": same}


def parse_arguments() -> argparse.Namespace:
    """Read the command line; `--tiny` sets what it does not."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", choices=MODELS, default=DEFAULT_MODEL, help="whose widths")
    parser.add_argument("--residency", choices=[*Residency, AUTO], nargs="+", default=RESIDENCIES)
    parser.add_argument("--compile", choices=COMPILES, default="both")
    parser.add_argument("--not-exact", action="store_true", help="compile with engine.exact = false")
    parser.add_argument("--blocks", type=int, default=8, help="of the model (8)")
    parser.add_argument("--tokens", type=int, help="of a micro-batch (7800: 480×832, 17 frames)")
    parser.add_argument("--micro-batches", type=int, default=4, help="of the step (4)")
    parser.add_argument("--devices", help="for example cuda:0,cuda:1; two by default")
    parser.add_argument("--json", type=Path, default=Path("gradients.json"), help="file for the figures")
    parser.add_argument("--tiny", action="store_true", help="a tiny model of the same family")
    options = parser.parse_args()
    options.model = tiny_shape(model_shape(options.model)) if options.tiny else model_shape(options.model)
    options.tokens = options.tokens or (TINY_TOKENS if options.tiny else TOKENS)
    return options


def main() -> None:
    """Compare, and repeat."""
    options = parse_arguments()
    before_first_product("deterministic")
    devices = measuring.devices_from(options.devices)
    facts = machine.facts(dict.fromkeys(devices))
    measuring.print_machine(facts)
    found = measure(options, devices)
    given = {**vars(options), "model": options.model.name}
    what = {"machine": facts, "options": {key: str(value) for key, value in given.items()}, **found}
    measuring.add_results(options.json, {f"gradients {options.model.name}": what})


if __name__ == "__main__":
    main()
