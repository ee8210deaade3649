"""A tiny FLUX.2 transformer and LoRAs for it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from diffusers import Flux2Transformer2DModel
from torch import Tensor, nn

from tworeel.lora.naming import Naming
from tworeel.lora.tensors import LoraFile, LoraTensors
from tworeel.models.flux2.lora_names import (
    NATIVE_WORDS,
    OWN_WORDS,
    SWAPPED,
    from_native,
    native_parts,
    to_native,
)

NAMING = Naming(
    to_native=to_native,
    from_native=from_native,
    words=NATIVE_WORDS,
    own_words=OWN_WORDS,
    native_parts=native_parts,
    swapped=SWAPPED,
    diffsynth_names="diffusers",
)
QKV = ("to_q", "to_k", "to_v", "add_q_proj", "add_k_proj", "add_v_proj")
TARGETS = (*QKV, "to_out.0", "to_add_out", "linear_in", "linear_out", "to_qkv_mlp_proj", "attn.to_out")
WIDTH = 32


def tiny_flux2(dtype: torch.dtype = torch.float32) -> Flux2Transformer2DModel:
    torch.manual_seed(1)
    model = Flux2Transformer2DModel(
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=24,
        in_channels=8,
        timestep_guidance_channels=16,
        axes_dims_rope=(4, 4, 4, 4),
    )
    return model.to(dtype).eval()


def inputs() -> dict[str, Tensor]:
    """What the tiny transformer's forward takes: four image tokens and five of text."""
    generator = torch.Generator().manual_seed(2)
    ids = torch.zeros(9, 4)
    ids[:4, 1], ids[4:, 3] = torch.arange(4), torch.arange(5)
    return {
        "hidden_states": torch.randn(1, 4, 8, generator=generator),
        "encoder_hidden_states": torch.randn(1, 5, 24, generator=generator),
        "timestep": torch.tensor([0.5]),
        "guidance": torch.tensor([1.0]),
        "img_ids": ids[None, :4],
        "txt_ids": ids[None, 4:],
    }


def linear_sizes(outside_blocks: bool = False) -> dict[str, tuple[int, int]]:
    """Inputs and outputs of the linear layers, by name."""
    return {
        name: (module.in_features, module.out_features)
        for name, module in tiny_flux2().named_modules()
        if isinstance(module, nn.Linear) and (outside_blocks or "blocks." in name)
    }


def random_flux2_lora(
    seed: int,
    *,
    alphas: Sequence[Tensor | None] = (None,),
    dtype: torch.dtype = torch.float32,
    ranks: Sequence[int] = (4,),
    dora: bool = False,
    names: Sequence[str] | None = None,
    metadata: dict[str, str] | None = None,
) -> LoraFile:
    """A LoRA on all layers of the blocks; alphas and ranks take turns from block to block."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(dtype)

    modules = {}
    for name, (inputs_, outputs) in linear_sizes(outside_blocks=True).items():
        if not (name in names if names is not None else "blocks." in name):
            continue
        turn = int(next((part for part in name.split(".") if part.isdigit()), "0")) + len(name.split(".")[0])
        rank = ranks[turn % len(ranks)]
        modules[name] = LoraTensors(
            down=draw(rank, inputs_),
            up=draw(outputs, rank),
            alpha=alphas[turn % len(alphas)],
            magnitude=draw(outputs).abs() if dora else None,
        )
    return LoraFile(modules=modules, metadata=metadata or {})
