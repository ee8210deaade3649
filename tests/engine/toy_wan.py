"""A small model of each Wan kind at toy size, made by diffusers' own class, and inputs for it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from diffusers import WanTransformer3DModel
from diffusers.utils import logging
from peft import LoraConfig
from torch import Tensor

# `model.to(dtype)` warns about the modules that from_pretrained would keep in fp32; both sides do the same.
logging.set_verbosity_error()

COMMON = {
    "num_attention_heads": 2,
    "attention_head_dim": 12,
    "ffn_dim": 32,
    "freq_dim": 16,
    "text_dim": 16,
    "num_layers": 5,
    "rope_max_seq_len": 32,
}
KINDS: dict[str, dict[str, Any]] = {
    "t2v": {"in_channels": 16},
    "i2v": {"in_channels": 36},
    "i2v-clip": {"in_channels": 36, "image_dim": 20, "added_kv_proj_dim": 24},
    "flf2v": {"in_channels": 36, "image_dim": 20, "added_kv_proj_dim": 24, "pos_embed_seq_len": 14},
    "ti2v": {"in_channels": 48, "out_channels": 48},
}
LORA_TARGETS = r"blocks\..*\.(to_q|to_k|to_v|to_out\.0|net\.0\.proj|net\.2)"


def make_wan(
    kind: str, dtype: torch.dtype, *, targets: str | list[str] = LORA_TARGETS, **sizes: int
) -> WanTransformer3DModel:
    """A Wan transformer with LoRA; the same weights whenever it is called."""
    torch.manual_seed(0)
    model = WanTransformer3DModel(**{**COMMON, "out_channels": 16, **KINDS[kind], **sizes})
    model.requires_grad_(False)
    model.add_adapter(LoraConfig(r=3, lora_alpha=3, target_modules=targets, init_lora_weights=False))
    return model.to(dtype)


def make_micro_batch(kind: str, dtype: torch.dtype, seed: int) -> dict[str, Tensor]:
    """Inputs of one micro-batch; frames and size differ with the seed."""
    generator = torch.Generator().manual_seed(seed)
    config = KINDS[kind]
    frames, height, width = 1 + seed % 3, 4, 4 + 2 * (seed % 2)

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

    timestep = torch.rand(1, generator=generator) * 1000
    batch = {
        "hidden_states": randn(1, config["in_channels"], frames, height, width),
        "timestep": timestep,
        "encoder_hidden_states": randn(1, 512 if "image_dim" in config else 7, 16),
    }
    if kind == "ti2v":
        tokens = frames * height * width // 4
        batch["timestep"] = (torch.arange(tokens) >= height * width // 4).float()[None] * timestep
    if "image_dim" in config:
        images = 2 if kind == "flf2v" else 1
        batch["encoder_hidden_states_image"] = randn(images, 7, 20)
    return batch


def square_loss(output: Any, micro_batch: dict[str, Tensor]) -> Tensor:
    """A loss with a gradient that differs from element to element."""
    return output.sample.double().square().mean() / 3


def gradients(model: torch.nn.Module) -> dict[str, Tensor]:
    """Gradients of all trainable parameters, by name."""
    return {n: p.grad for n, p in model.named_parameters() if p.requires_grad and p.grad is not None}


def run_unsplit(
    model: torch.nn.Module, batches: list[dict[str, Tensor]], loss: Callable[..., Tensor] = square_loss
) -> tuple[list[Tensor], dict[str, Tensor]]:
    """The other side of every parity test: the model's own forward and one backward per micro-batch."""
    losses = []
    for batch in batches:
        value = loss(model(**batch), batch)
        value.backward()
        losses.append(value.detach())
    return losses, gradients(model)


def assert_close(ours: dict[str, Tensor], theirs: dict[str, Tensor], relative: float) -> None:
    """Every tensor of both sides agrees, relative to its norm."""
    assert ours.keys() == theirs.keys()
    for name, expected in theirs.items():
        error = (ours[name] - expected).norm() / expected.norm().clamp_min(1e-30)
        assert error <= relative, f"{name}: {error:.2e}"
