"""What 8 and 4 bits cost a tiny FLUX.2: double blocks, and single ones whose layers are fused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import Flux2Transformer2DModel
from quantized_wan import gradients, learn_something, loss
from torch import Tensor, nn

from tworeel.lora.inject import inject_lora
from tworeel.models.flux2.transformer import BLOCK_LISTS, LORA_PRESETS
from tworeel.quant import block_linears, quantize_blocks

pytest.importorskip("bitsandbytes")
TARGETS = LORA_PRESETS["all-linear"]
SIZES: dict[str, Any] = {
    "num_layers": 2,
    "num_single_layers": 3,
    "num_attention_heads": 2,
    "attention_head_dim": 32,
    "joint_attention_dim": 48,
    "in_channels": 16,
    "timestep_guidance_channels": 16,
    "axes_dims_rope": (8, 8, 8, 8),
}


def make_flux2(kind: str | None) -> nn.Module:
    """The same weights and LoRA whenever it is called, as after some steps; `kind` None is not quantized."""
    torch.manual_seed(1)
    model = Flux2Transformer2DModel(**SIZES).to(torch.bfloat16)
    if kind is not None:
        quantize_blocks(model, kind, block_linears(model, BLOCK_LISTS))
    inject_lora(model, rank=4, alpha=4, targets=TARGETS, block_lists=BLOCK_LISTS)
    learn_something(model)
    return model


def make_batch() -> dict[str, Tensor]:
    """16 tokens of an image, 8 of text."""
    generator = torch.Generator().manual_seed(3)
    img_ids, txt_ids = torch.zeros(1, 16, 4), torch.zeros(1, 8, 4)
    img_ids[0, :, 1:3] = torch.cartesian_prod(torch.arange(4.0), torch.arange(4.0))
    txt_ids[0, :, 3] = torch.arange(8.0)
    return {
        "hidden_states": torch.randn(1, 16, 16, generator=generator).bfloat16(),
        "encoder_hidden_states": torch.randn(1, 8, 48, generator=generator).bfloat16(),
        "timestep": torch.tensor([0.5]),
        "guidance": torch.tensor([1.0]),
        "img_ids": img_ids,
        "txt_ids": txt_ids,
    }


def answer(kind: str | None) -> tuple[Tensor, dict[str, Tensor]]:
    """The output, and the gradients of the LoRA."""
    model, batch = make_flux2(kind), make_batch()
    output = model(**batch)
    loss(output, batch).backward()
    return output.sample.detach().double(), gradients(model)


def error(ours: Tensor, reference: Tensor) -> float:
    """Norm of the difference over that of the reference."""
    return float((ours.double() - reference.double()).norm() / reference.double().norm())


def as_one(found: dict[str, Tensor]) -> Tensor:
    return torch.cat([gradient.flatten() for gradient in found.values()])


@pytest.mark.parametrize(
    ("kind", "output_bound", "gradient_bound"),
    [("fp8", 0.008, 0.08), ("int8", 0.006, 0.03), ("nf4", 0.014, 0.2)],
)
def test_output_and_gradients_are_near_to_those_on_bf16_weights(
    kind: str, output_bound: float, gradient_bound: float
) -> None:
    output, ours = answer(kind)
    reference, theirs = answer(None)
    assert ours.keys() == theirs.keys()
    assert 0 < error(output, reference) < output_bound
    assert 0 < error(as_one(ours), as_one(theirs)) < gradient_bound
