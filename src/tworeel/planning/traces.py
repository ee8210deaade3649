"""What tracing a model's blocks gives, and what it depends on."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch

from tworeel.engine.footprints import Footprint
from tworeel.engine.residency import Residency
from tworeel.planning.work import Work
from tworeel.quant.matmul import Mode

STORED_ONLY = ("nf4",)
"""Weights that are dequantized for each use: the block computes as one of bf16 that is not exact."""

MeasuredBytes = Mapping[tuple[str, int, Residency], Footprint]
"""What blocks were found to take: by the name of their list, the bytes that one gives to the next, which tell
how many tokens the clip had, and what they leave behind."""


@dataclass(frozen=True, kw_only=True)
class TraceSettings:
    """What a block's cost depends on, beside the model and the clip."""

    dtype: torch.dtype = torch.bfloat16
    quantize: str | None = None
    mode: Mode = "rowwise"
    """How the cards multiply 8-bit weights."""
    compile: bool = True
    exact: bool = True
    """Whether compiled blocks may round as they do uncompiled, see `tworeel.engine.compiling`."""
    rank: int = 32
    dora: bool = False
    targets: tuple[str, ...]
    """Names of the linear layers that the LoRA adapts."""
    condition_on_image: bool = True


@dataclass(frozen=True, kw_only=True)
class BlockTrace:
    """What one block costs for one micro-batch."""

    footprints: Mapping[Residency, Footprint]
    forward: Work
    backward: Work
    recomputed: Mapping[Residency, Work]
    """What is computed once more in the backward."""
    repeats_attention: bool = False
    """Whether `SELECTIVE`, compiled, computes some attention once more: over a short text."""


@dataclass(frozen=True, kw_only=True)
class ModelTrace:
    """What the blocks of each list cost, and what runs around them."""

    blocks: Mapping[str, BlockTrace]
    """By the name of the list."""
    inputs: int
    """Bytes of a micro-batch that all blocks of a stage share: text, rotary tables, modulation."""
    head: int = 0
    """Bytes that the model takes behind its last block."""
    measured: bool = False
    """Whether some footprints are what a run has measured."""

    def mapped(
        self, work: Callable[[Work], Work], footprint: Callable[[Footprint], Footprint] = lambda same: same
    ) -> ModelTrace:
        """The same blocks with other work and other footprints."""
        blocks = {
            name: replace(
                block,
                footprints={key: footprint(value) for key, value in block.footprints.items()},
                forward=work(block.forward),
                backward=work(block.backward),
                recomputed={key: work(value) for key, value in block.recomputed.items()},
            )
            for name, block in self.blocks.items()
        }
        return replace(self, blocks=blocks)
