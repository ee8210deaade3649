"""The formula against what torch counts."""

from __future__ import annotations

import pytest
import torch
from diffusers import Flux2Transformer2DModel
from diffusers.models.transformers.transformer_wan import WanTransformerBlock
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from tworeel.benchmarks.flops import ATTENTION_BACKWARD, work_of
from tworeel.benchmarks.widths import FLUX2_DEV, TINY, TINY_FLUX2, WAN_14B

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


def count_flux2(blocks: int) -> tuple[int, int]:
    """Operations of a frozen transformer's forward and backward, with attention as matrix products."""
    model = Flux2Transformer2DModel(**TINY_FLUX2.config(blocks)).requires_grad_(False)
    inputs = {
        "hidden_states": torch.randn(1, TOKENS, TINY_FLUX2.channels, requires_grad=True),
        "encoder_hidden_states": torch.randn(1, TEXT, TINY_FLUX2.text_dim, requires_grad=True),
        "timestep": torch.ones(1),
        "guidance": torch.ones(1),
        "img_ids": torch.zeros(1, TOKENS, 4),
        "txt_ids": torch.zeros(1, TEXT, 4),
    }
    with sdpa_kernel(SDPBackend.MATH):
        with FlopCounterMode(display=False) as forward:
            output = model(**inputs).sample
        with FlopCounterMode(display=False) as backward:
            output.sum().backward()
    return forward.get_total_flops(), backward.get_total_flops()


@pytest.mark.parametrize(("fewer", "more"), [(2, 3), (5, 8)], ids=["single", "both"])
def test_flux2s_blocks_are_what_torch_counts(fewer: int, more: int) -> None:
    # What lies around the blocks is the same in both.
    forward, backward = (b - a for a, b in zip(count_flux2(fewer), count_flux2(more), strict=True))
    work = work_of(TINY_FLUX2, TOKENS, blocks=more - fewer, text_tokens=TEXT)
    assert work.linear + work.attention == forward
    unfused = work.backward - (ATTENTION_BACKWARD - 2) * work.attention
    assert unfused == backward


def test_an_image_of_flux2_dev_is_the_work_of_its_parameters() -> None:
    work = work_of(FLUX2_DEV, 1024, FLUX2_DEV.blocks)
    # Each of the 1,536 tokens meets the weights of a single block in each of the 56 blocks.
    assert work.linear == pytest.approx(2 * 1536 * 56 * 490.7e6, rel=0.001)
