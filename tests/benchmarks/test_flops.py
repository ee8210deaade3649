"""The formula against what torch counts."""

from __future__ import annotations

import pytest
import torch
from diffusers.models.transformers.transformer_wan import WanTransformerBlock
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from tworeel.benchmarks.flops import ATTENTION_BACKWARD, work_of
from tworeel.benchmarks.shapes import TINY, WAN_14B

TOKENS, TEXT = 48, 16


def count() -> tuple[int, int]:
    """Operations of a frozen block's forward and backward, with attention as matrix products."""
    block = WanTransformerBlock(TINY.dim, TINY.ffn_dim, TINY.heads, cross_attn_norm=True).requires_grad_(
        False
    )
    hidden = torch.randn(1, TOKENS, TINY.dim, requires_grad=True)
    text = torch.randn(1, TEXT, TINY.dim)
    table = torch.randn(1, TOKENS, 1, 128)
    with sdpa_kernel(SDPBackend.MATH):
        with FlopCounterMode(display=False) as forward:
            output = block(hidden, text, torch.randn(1, 6, TINY.dim), (table, table))
        with FlopCounterMode(display=False) as backward:
            output.sum().backward()
    return forward.get_total_flops(), backward.get_total_flops()


def test_the_forward_is_what_torch_counts() -> None:
    work = work_of(TINY, TOKENS, blocks=1, text_tokens=TEXT)
    assert work.linear + work.attention == count()[0]


def test_the_backward_is_what_torch_counts_with_a_fused_attention() -> None:
    # As matrix products the backward of self-attention is four (2 times the forward); of cross-attention,
    # whose keys and values need no gradient, two. A fused kernel computes all five in both.
    work = work_of(TINY, TOKENS, blocks=1, text_tokens=TEXT)
    to_self, to_text = (4 * TOKENS * keys * TINY.dim for keys in (TOKENS, TEXT))
    unfused = work.backward - ATTENTION_BACKWARD * work.attention + 2 * to_self + to_text
    assert unfused == count()[1]


def test_work_grows_with_blocks_and_is_that_of_the_design_at_real_size() -> None:
    one, all_blocks = work_of(WAN_14B, 20_280, 1), work_of(WAN_14B, 20_280, 40)
    assert all_blocks.total == pytest.approx(40 * one.total)
    assert all_blocks.linear + all_blocks.attention == pytest.approx(8.3e14, rel=0.01)
    assert all_blocks.backward == pytest.approx(1.34e15, rel=0.02)
