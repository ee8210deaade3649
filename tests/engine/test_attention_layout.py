from __future__ import annotations

import subprocess
import sys

SCRIPT = """
import torch
from torch.nn.functional import scaled_dot_product_attention
from tworeel.engine.attention_layout import lay_out_gradients

NAME = "_scaled_dot_product_flash_attention_for_cpu_backward"
kernel = torch.library.get_kernel(f"aten::{NAME}", "CPU")
seen = []

def watch(keys, gradient, *inputs, **named):
    seen.append(gradient.stride() == inputs[3].stride())
    return kernel.call_boxed(keys, gradient, *inputs, **named)

def gradients(of):
    torch.manual_seed(0)
    inputs = [torch.randn(1, 8, 2, 16).transpose(1, 2).requires_grad_() for _ in range(3)]
    return torch.autograd.grad(scaled_dot_product_attention(*inputs), inputs, of)

library = torch.library.Library("aten", "IMPL")
library.impl(NAME, watch, "CPU", with_keyset=True)
strided = torch.randn(1, 2, 8, 40)[..., :16]
before = gradients(strided)
lay_out_gradients(NAME, "CPU")
for of in (strided, strided.contiguous(), strided.transpose(1, 2).contiguous().transpose(1, 2)):
    torch.testing.assert_close(gradients(of), before)
assert seen == [False, True, True, True], seen
"""


def test_a_gradient_reaches_the_kernel_in_the_layout_of_the_output() -> None:
    """In a process of its own, whose kernels are changed for good."""
    subprocess.run([sys.executable, "-W", "ignore", "-c", SCRIPT], check=True)
