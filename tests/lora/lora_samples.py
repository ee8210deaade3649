"""LoRAs for the tests."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tworeel.lora.state import lora_parameters
from tworeel.lora.tensors import LoraFile, LoraTensors

BLOCK_ENDINGS = (
    *(f"attn{which}.{part}" for which in (1, 2) for part in ("to_q", "to_k", "to_v", "to_out.0")),
    "ffn.net.0.proj",
    "ffn.net.2",
)


def disturb(model: nn.Module, seed: int = 3) -> None:
    """Move every trained value away from its start."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in lora_parameters(model).items():
            noise = torch.randn(parameter.shape, generator=generator).to(parameter.dtype)
            parameter.mul_(1 + 0.05 * noise) if name.endswith("magnitude") else parameter.add_(0.03 * noise)


def random_lora(
    seed: int,
    *,
    alphas: tuple[Tensor | None, ...] = (None,),
    dtype: torch.dtype = torch.float32,
    ranks: tuple[int, ...] = (4,),
    dora: bool = False,
    blocks: int = 2,
    metadata: dict[str, str] | None = None,
) -> LoraFile:
    """A LoRA on all layers of the tiny Wan's blocks; alphas and ranks take turns."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(dtype)

    modules = {}
    for index, name in enumerate(
        f"blocks.{block}.{ending}" for block in range(blocks) for ending in BLOCK_ENDINGS
    ):
        outputs = 320 if name.endswith("net.0.proj") else 256
        inputs = 320 if name.endswith("net.2") else 256
        rank = ranks[index % len(ranks)]
        modules[name] = LoraTensors(
            down=draw(rank, inputs),
            up=draw(outputs, rank),
            alpha=alphas[index % len(alphas)],
            magnitude=draw(outputs) if dora else None,
        )
    return LoraFile(modules=modules, metadata=metadata or {})
