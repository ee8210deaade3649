"""cuDNN's attention where gradients come in one layout, then in another, from the same thread."""

from __future__ import annotations

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from tworeel.engine.attention_layout import keep_gradient_layouts

pytestmark = pytest.mark.gpu
SHAPE = (1, 512, 8, 128)


def gradients(gpu: torch.device, row: int) -> list[torch.Tensor]:
    """Of query, key and value, for a gradient whose rows are `row` numbers apart."""
    torch.manual_seed(0)
    inputs = [
        torch.randn(SHAPE, dtype=torch.bfloat16).to(gpu).transpose(1, 2).requires_grad_() for _ in range(3)
    ]
    of = torch.randn(SHAPE, dtype=torch.bfloat16)
    wide = torch.zeros(1, 512, row, dtype=torch.bfloat16, device=gpu)
    wide[..., : 8 * 128] = of.flatten(2).to(gpu)
    output = scaled_dot_product_attention(*inputs).transpose(1, 2).flatten(2)
    return list(torch.autograd.grad(output, inputs, wide[..., : 8 * 128]))


def test_two_layouts_of_the_gradient_give_the_same_gradients(cuda: torch.device) -> None:
    keep_gradient_layouts()
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        expected = gradients(cuda, 8 * 128)
    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
        strided, dense = gradients(cuda, 32 * 128), gradients(cuda, 8 * 128)
    for one, other, wanted in zip(strided, dense, expected, strict=True):
        torch.testing.assert_close(one, wanted, rtol=0.05, atol=0.02)
        torch.testing.assert_close(other, wanted, rtol=0.05, atol=0.02)
