"""What 8 and 4 bits cost in precision: frozen fp8, int8 and nf4 weights against bf16.

    python bench/precision.py                      4 blocks of Wan 14B, 7,800 tokens, on the first GPU
    python bench/precision.py --model flux2-dev --tokens 4096
    python bench/precision.py --kinds fp8,int8 --blocks 8
    python bench/precision.py --tiny               seconds, on the CPU

Weights, inputs and the LoRA are random, the same for each kind: trained weights have outliers in their
channels that these have not, so real errors can be larger. Prints a table; `--json` writes the figures.
"""

from __future__ import annotations

import argparse
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import measuring
import torch
from torch import Tensor, nn

from tworeel.benchmarks import machine, models
from tworeel.benchmarks.shapes import Case, model_shape, square_grid
from tworeel.benchmarks.widths import DEFAULT_MODEL, MODELS, TINY_TOKENS, tiny_shape
from tworeel.lora.state import lora_parameters
from tworeel.quant import KINDS

TOKENS = 7800


@dataclass(frozen=True)
class Answer:
    """What a model made of the same input."""

    output: Tensor
    gradients: dict[str, Tensor]


@dataclass(frozen=True, kw_only=True)
class Difference:
    """How far a quantized model's answer is from that of the bf16 model."""

    output_cosine: float
    output_error: float
    gradient_cosine: float
    """Of all LoRA gradients, as one vector."""
    gradient_error: float
    worst_tensor: str
    """The LoRA tensor whose gradient has the lowest cosine."""
    worst_cosine: float
    worst_error: float


def make_model(case: Case, blocks: int, kind: Any, device: torch.device, rank: int) -> nn.Module:
    """Make the transformer on its device with a LoRA in it; the same values for each kind, None for bf16."""
    model = models.build(case.model, blocks)
    family = models.family_of(case.model)
    placement = models.place_model(model, family, [device], None)
    models.fill(model, family, placement, dtype=torch.bfloat16, rank=rank, quantize=kind)
    return model.to(device)  # what is no parameter, too: rotary tables


def answer(model: nn.Module, batch: dict[str, Tensor]) -> Answer:
    """Run the model once, forward and backward."""
    output = model(**batch).sample
    generator = torch.Generator(output.device).manual_seed(1)
    target = torch.randn(output.shape, device=output.device, generator=generator)
    (output.float() - target).square().mean().backward()
    gradients = {name: p.grad.cpu() for name, p in lora_parameters(model).items() if p.grad is not None}
    return Answer(output.detach().float().cpu(), gradients)


def difference(ours: Answer, reference: Answer) -> Difference:
    """Compare two answers."""
    tensors = {name: alike(gradient, reference.gradients[name]) for name, gradient in ours.gradients.items()}
    worst = min(tensors, key=lambda name: tensors[name][0])
    output = alike(ours.output, reference.output)
    together = alike(*(torch.cat([g.flatten() for g in a.gradients.values()]) for a in (ours, reference)))
    return Difference(
        output_cosine=output[0],
        output_error=output[1],
        gradient_cosine=together[0],
        gradient_error=together[1],
        worst_tensor=worst,
        worst_cosine=tensors[worst][0],
        worst_error=tensors[worst][1],
    )


def alike(ours: Tensor, reference: Tensor) -> tuple[float, float]:
    """Return the cosine of two tensors, and the norm of their difference relative to the reference's."""
    a, b = ours.double().flatten(), reference.double().flatten()
    return torch.cosine_similarity(a, b, dim=0).item(), ((a - b).norm() / b.norm()).item()


def measure(arguments: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """Build each kind in turn and compare it with bf16."""
    grid = square_grid(arguments.tokens, "--tokens")
    case = Case(name="precision", model=arguments.model, grid=grid, micro_batches=1)
    batch = models.make_batches(case, torch.bfloat16, device)[0]

    def answer_of(kind: str | None) -> Answer:
        return answer(make_model(case, arguments.blocks, kind, device, arguments.rank), batch)

    reference = answer_of(None)
    found = {kind: difference(answer_of(kind), reference) for kind in arguments.kinds}
    measuring.print_table(
        f"{case.model.name}, {arguments.blocks} blocks, {arguments.tokens} tokens, against bf16: "
        "cosine (relative error)",
        ("weights", "output", "LoRA gradient", "its worst tensor", "which"),
        (row(kind, difference) for kind, difference in found.items()),
    )
    return {kind: asdict(difference) for kind, difference in found.items()}


def row(kind: str, found: Difference) -> tuple[str, ...]:
    """A line of the table."""
    return (
        kind,
        f"{found.output_cosine:.5f} ({found.output_error:.4f})",
        f"{found.gradient_cosine:.5f} ({found.gradient_error:.4f})",
        f"{found.worst_cosine:.5f} ({found.worst_error:.4f})",
        found.worst_tensor,
    )


def parse_arguments() -> argparse.Namespace:
    """Read the command line; `--tiny` sets what it does not."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", choices=MODELS, default=DEFAULT_MODEL, help="whose widths")
    parser.add_argument("--kinds", default=",".join(KINDS), help="of weights, of " + ", ".join(KINDS))
    parser.add_argument("--blocks", type=int, default=4, help="blocks of the transformer")
    parser.add_argument("--tokens", type=int, help="tokens of the input (7800: 480×832, 17 frames)")
    parser.add_argument("--device", help="the first GPU by default")
    parser.add_argument("--rank", type=int, default=32, help="of the LoRA")
    parser.add_argument("--json", type=Path, help="file for the figures")
    parser.add_argument("--tiny", action="store_true", help="a tiny model of the same family")
    arguments = parser.parse_args()
    shape = model_shape(arguments.model)
    arguments.model = tiny_shape(shape) if arguments.tiny else shape
    arguments.kinds = arguments.kinds.split(",")
    arguments.tokens = arguments.tokens or (TINY_TOKENS if arguments.tiny else TOKENS)
    return arguments


def main() -> None:
    """Run the comparison."""
    arguments = parse_arguments()
    device = measuring.devices_from(arguments.device)[0]
    facts = machine.facts([device])
    measuring.print_machine(facts)
    results = measure(arguments, device)
    if arguments.json:
        given = {**vars(arguments), "model": arguments.model.name}
        what = {"machine": facts, "options": {key: str(value) for key, value in given.items()}, **results}
        measuring.add_results(arguments.json, {f"precision {arguments.model.name}": what})


if __name__ == "__main__":
    main()
