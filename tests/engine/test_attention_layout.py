from __future__ import annotations

import subprocess
import sys

import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from tworeel.engine.attention_layout import LaidOutGradients

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


def test_a_graph_copies_a_gradient_of_another_layout_and_no_other() -> None:
    attend = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
    backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default

    def function(query: Tensor, key: Tensor, value: Tensor, *given: Tensor) -> list[Tensor]:
        output, statistics = attend(query, key, value)
        results = (backward(one, query, key, value, output, statistics, 0.0, False) for one in given)
        return [tensor for result in results for tensor in result]

    inputs = [torch.randn(2, 8, 3, 16).transpose(1, 2) for _ in range(3)]
    gradients = [torch.randn(2, 3, 8, 16), torch.randn(2, 8, 3, 16).transpose(1, 2)]
    traced = make_fx(function, tracing_mode="fake")(*inputs, *gradients)
    expected = traced(*inputs, *gradients)
    LaidOutGradients(backward)(traced.graph)
    traced.recompile()
    first, second = traced.graph.find_nodes(op="call_function", target=backward)
    for node in (first, second):
        assert node.args[0].meta["val"].stride() == node.args[4].meta["val"].stride()
    assert first.args[0].op == "call_function"
    assert second.args[0].op == "placeholder"
    torch.testing.assert_close(traced(*inputs, *gradients), expected)
