"""A tiny Wan with frozen layers in 8 or 4 bits; its widths are multiples of 16, as the kernels want them."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import WanTransformer3DModel
from torch import Tensor, nn

from tworeel.lora.inject import inject_lora
from tworeel.lora.state import lora_parameters
from tworeel.lora.targets import find_targets
from tworeel.models.wan.transformer import BLOCK_LISTS, LORA_PRESETS
from tworeel.quant import quantize_blocks

TARGETS = LORA_PRESETS["all-linear"]
SIZES: dict[str, Any] = {
    "num_attention_heads": 2,
    "attention_head_dim": 32,
    "ffn_dim": 128,
    "num_layers": 3,
    "in_channels": 4,
    "out_channels": 4,
    "text_dim": 16,
    "freq_dim": 16,
    "rope_max_seq_len": 32,
}


def make_wan(kind: str | None, dtype: torch.dtype = torch.bfloat16, **options: Any) -> WanTransformer3DModel:
    """The same weights and LoRA whenever it is called, as after some steps; `kind` None is not quantized."""
    torch.manual_seed(1)
    model = WanTransformer3DModel(**SIZES).to(dtype)
    if kind is not None:
        quantize_blocks(model, kind, find_targets(model, TARGETS, BLOCK_LISTS))
    inject_lora(model, rank=4, alpha=4, targets=TARGETS, block_lists=BLOCK_LISTS, **options)
    learn_something(model)
    return model


def learn_something(model: nn.Module) -> None:
    """Let each B of the LoRA be what it might be after some steps; at the start it is zero."""
    generator = torch.Generator().manual_seed(2)
    for name, parameter in lora_parameters(model).items():
        if name.endswith("lora_B"):
            parameter.data.normal_(std=0.05, generator=generator)


def make_batch(dtype: torch.dtype = torch.bfloat16, seed: int = 3) -> dict[str, Tensor]:
    """Inputs of one micro-batch; frames differ with the seed."""
    generator = torch.Generator().manual_seed(seed)
    return {
        "hidden_states": torch.randn(1, 4, 1 + seed % 3, 6, 6, generator=generator).to(dtype),
        "timestep": torch.tensor([500.0]),
        "encoder_hidden_states": torch.randn(1, 7, 16, generator=generator).to(dtype),
    }


def loss(output: Any, batch: dict[str, Tensor]) -> Tensor:
    """Mean square of the output against fixed noise."""
    sample = output.sample.float()
    target = torch.randn(sample.shape, generator=torch.Generator().manual_seed(4))
    return (sample - target).square().mean()


def gradients(model: nn.Module) -> dict[str, Tensor]:
    """The LoRA's, by name."""
    found = {name: parameter.grad for name, parameter in lora_parameters(model).items()}
    return {name: gradient for name, gradient in found.items() if gradient is not None}


def cosine(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> float:
    """Of all gradients as one vector."""
    assert ours.keys() == theirs.keys()
    vectors = [torch.cat([g.double().flatten() for g in found.values()]) for found in (ours, theirs)]
    return torch.cosine_similarity(*vectors, dim=0).item()
