"""A tiny Wan transformer, with and without a LoRA."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import WanTransformer3DModel
from torch import Tensor

from tworeel.lora.inject import inject_lora
from tworeel.lora.naming import Naming
from tworeel.models.wan.keys import NATIVE_WORDS, from_native, to_native

sys.path.insert(0, str(Path(__file__).parent))  # for lora_samples
from lora_samples import BLOCK_ENDINGS, disturb

MakeWan = Callable[..., WanTransformer3DModel]


@pytest.fixture
def naming() -> Naming:
    return Naming(to_native=to_native, from_native=from_native, words=NATIVE_WORDS)


@pytest.fixture
def make_wan() -> MakeWan:
    def make(dtype: torch.dtype = torch.float32, **config: Any) -> WanTransformer3DModel:
        torch.manual_seed(1)
        small = {"num_attention_heads": 2, "attention_head_dim": 128, "num_layers": 2, "ffn_dim": 320}
        sizes = {"in_channels": 4, "out_channels": 4, "text_dim": 32, "freq_dim": 32}
        return WanTransformer3DModel(**(small | sizes | config)).to(dtype).eval()

    return make


@pytest.fixture
def inputs() -> dict[str, Tensor]:
    """What the tiny transformer's forward takes."""
    generator = torch.Generator().manual_seed(2)
    return {
        "hidden_states": torch.randn(1, 4, 2, 4, 6, generator=generator),
        "timestep": torch.tensor([500.0]),
        "encoder_hidden_states": torch.randn(1, 5, 32, generator=generator),
    }


@pytest.fixture
def make_trained(make_wan: MakeWan) -> MakeWan:
    """Make a tiny Wan with a LoRA whose B is not zero, as after some steps."""

    def make(
        dtype: torch.dtype = torch.float32, *, config: dict[str, Any] | None = None, **options: Any
    ) -> WanTransformer3DModel:
        model = make_wan(dtype, **(config or {}))
        inject_lora(model, **({"rank": 4, "alpha": 4.0, "targets": BLOCK_ENDINGS} | options))
        disturb(model)
        return model

    return make
