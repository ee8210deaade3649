"""Flex attention for the CPU, where torch has no backward for it: dense, with the same mask and scores."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    block_mask: Any,
    scale: float | None,
    score_mod: Callable[..., Tensor] | None,
) -> Tensor:
    """B batch, N heads, S tokens, D width of a head: all of shape (B, N, S, D)."""
    assert block_mask.kv_indices.device == query.device, "the mask is on another device"
    rows = torch.arange(query.shape[2], device=query.device)[:, None]
    columns = torch.arange(key.shape[2], device=query.device)[None]
    scores = query @ key.transpose(-1, -2) * (scale or query.shape[-1] ** -0.5)
    if score_mod is not None:
        scores = score_mod(scores, 0, 0, rows, columns)
    return scores.masked_fill(~block_mask.mask_mod(0, 0, rows, columns), -1e4).softmax(-1) @ value


def install(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let DiffSynth use it; its masks stay flex attention's own."""
    from diffsynth.models import wan_animate_2_dit

    attention = importlib.import_module("diffsynth.core.attention.attention")
    monkeypatch.setattr(attention, "flex_attention_func", attend)
    uncompiled = partial(_without_compiling, wan_animate_2_dit.create_block_mask)
    monkeypatch.setattr(wan_animate_2_dit, "create_block_mask", uncompiled)


def _without_compiling(create: Callable[..., Any], *args: Any, **named: Any) -> Any:
    return create(*args, **named | {"_compile": False})
