"""The engine alone: 1F1B against one micro-batch at a time, on blocks as wide as Wan 14B's.

    python bench/engine.py                         40 blocks, 20,280 tokens, 8 micro-batches, two GPUs
    python bench/engine.py --blocks 20 --tokens 7800 --devices cuda:0,cuda:0
    python bench/engine.py --tiny                  seconds, on the CPU

The transformer is diffusers', with random weights made on the devices themselves and a LoRA on all linear
layers of the blocks. Prints a table with the ratio; `--json` writes the figures to a file.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import measuring
import schedules
import torch
from measuring import Meter
from real_size import SCALE, TINY, Sizes, transformer_config
from torch import Tensor, nn

from tworeel.engine import Pipeline, split
from tworeel.engine.placement import Placement, place
from tworeel.lora.inject import inject_lora
from tworeel.models.family import Component
from tworeel.models.wan.transformer import BLOCK_LISTS, LORA_PRESETS, build_transformer

MOST_POSITIONS = 1024
"""Positions of an axis that the class has rotary tables for."""
LATENT_CHANNELS = 16


def make_model(sizes: Sizes, blocks: int, placement_of: Any, dtype: torch.dtype, rank: int) -> nn.Module:
    """Build the transformer with every tensor made where it stays, and put a LoRA into it."""
    config = {**transformer_config(sizes), "num_layers": blocks}
    model = build_transformer(Component(files=(), layout="native", config=config))
    placement: Placement = placement_of(model)
    torch.manual_seed(0)
    for name, parameter in list(model.named_parameters()):
        path, _, leaf = name.rpartition(".")
        values = torch.empty(parameter.shape, dtype=dtype, device=placement.device_of(name))
        is_norm = parameter.dim() == 1 and leaf == "weight"
        values = values.fill_(1.0) if is_norm else values.normal_(std=SCALE)
        setattr(model.get_submodule(path), leaf, nn.Parameter(values, requires_grad=False))
    inject_lora(model, rank=rank, alpha=rank, targets=LORA_PRESETS["all-linear"], block_lists=BLOCK_LISTS)
    return model


def make_batches(
    sizes: Sizes, tokens: int, count: int, dtype: torch.dtype, device: torch.device
) -> list[dict[str, Tensor]]:
    """Random inputs of one frame that has this many tokens (a token is 2×2 latent pixels)."""
    height, width = latent_size(tokens)
    generator = torch.Generator().manual_seed(0)

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(device, dtype)

    return [
        {
            "hidden_states": randn(1, LATENT_CHANNELS, 1, height, width),
            "timestep": torch.full((1,), 900.0, device=device),
            "encoder_hidden_states": randn(1, 512, sizes.text_dim),
        }
        for _ in range(count)
    ]


def latent_size(tokens: int) -> tuple[int, int]:
    """Height and width in latent pixels, as square as the number allows.

    Raises:
        SystemExit: no rectangle has this many tokens.
    """
    rows = max(rows for rows in range(1, int(tokens**0.5) + 1) if tokens % rows == 0)
    if tokens // rows > MOST_POSITIONS:
        raise SystemExit(f"--tokens {tokens}: needs two factors of at most {MOST_POSITIONS}")
    return 2 * rows, 2 * (tokens // rows)


def loss(output: Any, batch: dict[str, Tensor]) -> Tensor:
    """Mean of the squares, in fp32."""
    return output.sample.float().square().mean()


def measure(arguments: argparse.Namespace, devices: Sequence[torch.device]) -> dict[str, Any]:
    """Build, compare and print."""
    sizes = TINY if arguments.tiny else Sizes()
    dtype = torch.float32 if arguments.tiny else torch.bfloat16
    with Meter(devices) as meter:
        meter.begin("build")

        def placement_of(model: nn.Module) -> Placement:
            return place(model, devices, blocks=BLOCK_LISTS)

        model = make_model(sizes, arguments.blocks, placement_of, dtype, arguments.rank)
        pipeline = Pipeline(
            split(model, devices, blocks=BLOCK_LISTS, residency=arguments.residency), slack=arguments.slack
        )
        batches = make_batches(sizes, arguments.tokens, arguments.micro_batches, dtype, devices[0])
        meter.begin("compare")
        found = schedules.compare(pipeline, batches, loss, rounds=arguments.rounds)
    measuring.print_phases("phases", meter.phases.values())
    what = f"{arguments.blocks} blocks, {arguments.tokens} tokens, {arguments.micro_batches} micro-batches"
    measuring.print_table(
        f"{what}, {arguments.residency}",
        ("schedule", "seconds a clip", "busy"),
        schedules.comparison_rows(found),
    )
    return {**asdict(found), "ratio": found.ratio, "phases": measuring.as_json(meter.phases.values())}


def parse_arguments() -> argparse.Namespace:
    """Read the command line; `--tiny` sets what it does not."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--blocks", type=int, help="blocks of the transformer (40)")
    parser.add_argument("--tokens", type=int, help="tokens of a micro-batch (20280: 480×832, 49 frames)")
    parser.add_argument("--micro-batches", type=int, help="of a step (8)")
    parser.add_argument("--devices", help="one a stage, for example cuda:0,cuda:1; the first two by default")
    parser.add_argument("--residency", choices=("keep", "recompute", "offload"), default="recompute")
    parser.add_argument("--slack", type=int, default=0, help="micro-batches in flight beyond 1F1B's")
    parser.add_argument("--rank", type=int, default=32, help="of the LoRA")
    parser.add_argument("--rounds", type=int, default=3, help="the medians of so many are told")
    parser.add_argument("--cap-gib", type=float, help="GiB that torch may use for each stage")
    parser.add_argument("--json", type=Path, help="file for the figures")
    parser.add_argument("--tiny", action="store_true", help="a model of a few million parameters, in fp32")
    arguments = parser.parse_args()
    blocks, tokens, micro_batches = (4, 64, 4) if arguments.tiny else (40, 20280, 8)
    arguments.blocks = arguments.blocks or blocks
    arguments.tokens = arguments.tokens or tokens
    arguments.micro_batches = arguments.micro_batches or micro_batches
    return arguments


def main() -> None:
    """Run the benchmark."""
    arguments = parse_arguments()
    devices = measuring.devices_from(arguments.devices)
    facts = measuring.machine(devices)
    measuring.print_machine(facts)
    if arguments.cap_gib:
        measuring.limit_memory(devices, arguments.cap_gib)
    measuring.wake(devices)
    results = measure(arguments, devices)
    if arguments.json:
        options = {key: str(value) for key, value in vars(arguments).items()}
        measuring.add_results(arguments.json, {"engine": {"machine": facts, "options": options, **results}})


if __name__ == "__main__":
    main()
